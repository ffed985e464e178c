"""Compute several LoRA projections of attention layers as one product.

    self-attention      q, k and v of a layer, where the table of the kernels says that the packed product is fused
    cross-attention     keys and values of the layers that see the text, of several layers in one product, at the start
                        of the UNet's forward; Stable Diffusion 1.5 has 32 such small products

This happens on a GPU only; elsewhere, and in layers that are not recognised, each layer projects by itself. The base
weights are concatenated at each call, since a kept copy would go stale when weights are loaded, merged or moved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2f_fast.layers.fused_layers import FusedLinear, hooked, operands, serves
from d2f_fast.ops import MIN_ROWS, autocasts, choose_path, lora_linear_packed, runs_plain

# Largest sum of ranks in one product of the text. The packed B is dense, and nearly all of it is zero: for all 140 text
# projections of SDXL it would take 1.5 GB at rank 16, and 6 GB at rank 64.
MOST_PACKED_RANKS = 128


class PackedAttention(Attention):
    """A diffusers Attention that computes its LoRA projections as one product where that is faster."""

    text_products: "TextProducts | None" = None
    text_index: int = -1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        attention: _Projected | None = None
        if not cross_attention_kwargs and type(self.processor) is AttnProcessor2_0:
            if encoder_hidden_states is None:
                attention = _self_projected(self, hidden_states)
            elif self.text_products is not None and self.text_products.text is encoder_hidden_states:
                key, value = self.text_products.projected[self.text_index]
                attention = _Projected(self, to_k=key, to_v=value)
        if attention is None:
            output: Tensor = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        else:
            output = self.processor(
                attention,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
            )
        return output


class TextProducts:
    """Keys and values of the text for every cross-attention of a UNet, held while its forward runs.

    Args:
        unet: UNet whose attention layers are `PackedAttention`.

    Attributes:
        wanted: False where each layer projects the text by itself, as in a block that is compiled alone.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.wanted = True
        modules = list(unet.modules())
        self.attentions = [module for module in modules if isinstance(module, PackedAttention) and _takes_text(module)]
        self.blocks = [module for module in modules if hasattr(module, "gradient_checkpointing")]
        self.text: Tensor | None = None
        self.projected: list[tuple[Tensor, Tensor]] = []
        self.hooks: list[RemovableHandle] = []


def pack_text_products(unet: UNet2DConditionModel) -> None:
    """Make a UNet compute the text's keys and values of several layers at once where that is faster.

    Args:
        unet: UNet whose attention layers are `PackedAttention`; it gets an attribute and two hooks, which
            `unpack_text_products` takes away.
    """
    products = TextProducts(unet)
    for index, attention in enumerate(products.attentions):
        attention.text_products, attention.text_index = products, index
    unet.text_products = products
    products.hooks = [
        unet.register_forward_pre_hook(_project_text, with_kwargs=True),
        unet.register_forward_hook(_forget_text, always_call=True),  # after an error too: a kept product goes stale
    ]


def unpack_text_products(unet: UNet2DConditionModel) -> None:
    """Undo `pack_text_products`; a UNet that it was not applied to stays as it is."""
    products: TextProducts | None = vars(unet).get("text_products")
    if products is None:
        return
    for hook in products.hooks:
        hook.remove()
    for module in (unet, *products.attentions):
        vars(module).pop("text_products", None)
        vars(module).pop("text_index", None)


def _project_text(unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compute all keys and values of the text before the UNet's forward, if this call is one to pack."""
    products: TextProducts = unet.text_products
    text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
    layers = [layer for attention in products.attentions for layer in (attention.to_k, attention.to_v)]
    # Only inside the forward does diffusers scale the adapters by cross_attention_kwargs, and project the text. A
    # checkpointed block runs again in backward, where this hook does not run.
    plain_call = len(args) <= 3 and kwargs.get("cross_attention_kwargs") is None and unet.encoder_hid_proj is None
    plain_call &= products.wanted and not any(block.gradient_checkpointing for block in products.blocks)
    if not plain_call or not isinstance(text, Tensor) or text.ndim != 3 or not _pays_for_text(text):
        return
    known = all(type(attention.processor) is AttnProcessor2_0 for attention in products.attentions)
    groups = _grouped(layers) if known and len(layers) > 2 and _can_pack(layers) else []
    if 0 < len(groups) < len(layers):
        projected = [product for group in groups for product in _packed(text, group)]
        products.text, products.projected = text, list(zip(projected[::2], projected[1::2], strict=True))


def _forget_text(unet: UNet2DConditionModel, args: tuple[object, ...], output: object) -> None:
    products: TextProducts = unet.text_products
    products.text, products.projected = None, []


class _Projected:
    """Stand-in for an attention, in its processor, that has some of its projections computed already."""

    def __init__(self, attention: Attention, **projected: Tensor) -> None:
        self._attention, self._projected = attention, projected

    def __getattr__(self, name: str) -> Any:
        if name in self._projected:
            return lambda _: self._projected[name]
        return getattr(self._attention, name)


def _self_projected(attention: Attention, hidden_states: Tensor) -> _Projected | None:
    """Return the attention with q, k and v computed in one product, or None where that is not faster."""
    layers = [attention.to_q, attention.to_k, attention.to_v]
    normed = attention.spatial_norm is not None or attention.group_norm is not None
    if normed or hidden_states.ndim != 3 or runs_plain(hidden_states.device) or not _can_pack(layers):
        return None
    ranks, features = sum(operands(layer)[0].shape[0] for layer in layers), sum(layer.out_features for layer in layers)
    x = hidden_states
    rows, dtype = x.shape[0] * x.shape[1], torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    if choose_path(rows, features, x.shape[2], ranks, dtype, x.device) != "split":
        return None
    query, key, value = _packed(x, layers)
    return _Projected(attention, to_q=query, to_k=key, to_v=value)


def _takes_text(attention: Attention) -> bool:
    return attention.is_cross_attention and not attention.norm_cross and attention.added_kv_proj_dim is None


def _pays_for_text(text: Tensor) -> bool:
    """Return whether the text has so few rows that many launches cost more than the zero blocks of a packed B."""
    return not runs_plain(text.device) and text.shape[0] * text.shape[1] < MIN_ROWS


def _can_pack(layers: Sequence[nn.Module]) -> bool:
    """Return whether one product can replace these layers: all are fused, and calling them runs only their forward."""
    fused = [layer for layer in layers if type(layer) is FusedLinear and not hooked(layer) and serves(layer)]
    return (
        len(fused) == len(layers)
        and len({layer.in_features for layer in fused}) == 1
        and len({layer.base_layer.bias is None for layer in fused}) == 1
    )


def _grouped(layers: Sequence[FusedLinear]) -> list[list[FusedLinear]]:
    """Return the layers in order, in groups as large as MOST_PACKED_RANKS allows."""
    groups: list[list[FusedLinear]] = []
    ranks = MOST_PACKED_RANKS
    for layer in layers:
        rank = operands(layer)[0].shape[0]
        if ranks + rank > MOST_PACKED_RANKS:
            groups.append([])
            ranks = 0
        groups[-1].append(layer)
        ranks += rank
    return groups


def _packed(x: Tensor, layers: Sequence[FusedLinear]) -> tuple[Tensor, ...]:
    lora_as, lora_bs = zip(*(operands(layer) for layer in layers), strict=True)
    bases = [layer.base_layer for layer in layers]
    biases = None if bases[0].bias is None else [base.bias for base in bases]
    return lora_linear_packed(x, [base.weight for base in bases], lora_as, lora_bs, biases)
