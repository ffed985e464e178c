"""`use_fused_lora`: run peft's LoRA layers on the fused path, reversibly; parameters, names and files stay peft's.

Only the class of a module changes: the new class is a subclass of the old one with another forward. So peft and
diffusers can still merge, scale, disable, copy and save the module, and giving it its old class back undoes the change.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from d2f_fast.layers.frozen_conv import FrozenConv2d
from d2f_fast.layers.fused_layers import FusedConv2d, FusedLinear, obstacle, operands
from d2f_fast.layers.packed_attention import PackedAttention, pack_text_products, unpack_text_products
from d2f_fast.ops import MIN_ROWS, choose_path, kernel_path, runs_plain

logger = logging.getLogger(__name__)

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    PeftLinear: FusedLinear,
    PeftConv2d: FusedConv2d,
    nn.Conv2d: FrozenConv2d,
    Attention: PackedAttention,
}
_ORIGINALS = {ours: theirs for theirs, ours in _CLASSES.items()}


class FusedLoRA:
    """Handle of `use_fused_lora`; `remove()`, or leaving the `with` block, restores the original forwards."""

    def __init__(self, unet: UNet2DConditionModel, swapped: Iterable[nn.Module]) -> None:
        self._unet, self._swapped = unet, list(swapped)

    def remove(self) -> None:
        """Give every layer its own forward back, also those that were merged or unloaded in the meantime."""
        _restore(self._unet, self._swapped)

    def __enter__(self) -> "FusedLoRA":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def use_fused_lora(unet: UNet2DConditionModel) -> FusedLoRA:
    """Run a UNet's LoRA layers on the fused path, and let its frozen convolutions keep no input for backward.

    The UNet computes the same function of the same parameters: nothing is renamed, cast or copied. Layers that the
    fused path does not know (dropout in training, DoRA and other variants, a bias on B, quantised or hooked layers) run
    peft's own forward, and one warning counts them. Adapters may be added, deleted, scaled, merged and disabled in the
    meantime; a module that peft wraps later runs peft's forward. When the last LoRA layer is gone, as after
    `merge_and_unload` or diffusers' `unload_lora`, the UNet is what it was before, without `.remove()`.

    Args:
        unet: diffusers UNet2DConditionModel with LoRA layers of peft; it must be the network itself, to which
            torch.compile or DistributedDataParallel are applied afterwards.

    Returns:
        A handle: `.remove()`, or leaving `with use_fused_lora(unet):`, gives the layers their own forward back.

    Raises:
        ValueError: `unet` is not a UNet2DConditionModel, has no LoRA layer, or is on the fused path already.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"unet must be a diffusers UNet2DConditionModel, got {type(unet).__name__}: pass the network itself, before"
            " torch.compile or another wrapper (unet.compile() compiles it in place)"
        )
    modules = list(unet.modules())
    if any(type(module) in _ORIGINALS for module in modules):
        raise ValueError("this unet is on the fused path already: call .remove() of the handle of use_fused_lora first")
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("unet has no LoRA layers: add an adapter first, with unet.add_adapter or load_lora_weights")
    swapped = [module for module in modules if type(module) in _CLASSES]
    for module in swapped:
        module.__class__ = _CLASSES[type(module)]
    reasons = Counter(reason for layer in layers if (reason := obstacle(layer, training=True)))
    if reasons:
        causes = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        logger.warning("%d of %d LoRA layers run peft's own forward: %s", reasons.total(), len(layers), causes)
    pack_text_products(unet)
    _restore_after_the_last(layers, unet)
    return FusedLoRA(unet, [module for module in swapped if not isinstance(module, LoraLayer)])


def _restore(unet: UNet2DConditionModel, swapped: Iterable[nn.Module] = ()) -> None:
    """Give the modules of a UNet, and further ones that were part of it, their own classes back."""
    # peft gives A and B of a new adapter the class of the convolution that they adapt, so all modules are searched.
    for module in [*swapped, *unet.modules()]:
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    unpack_text_products(unet)


def _restore_after_the_last(layers: Iterable[nn.Module], unet: UNet2DConditionModel) -> None:
    """Restore a UNet when the last of these layers is no longer in memory; neither is kept in memory for that."""
    left = {id(layer) for layer in layers}
    reference = weakref.ref(unet)

    def forget(layer: int) -> None:
        left.discard(layer)
        if not left and (kept := reference()) is not None:
            _restore(kept)

    for layer in layers:
        weakref.finalize(layer, forget, id(layer)).atexit = False


def lora_paths(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> str:
    """Describe in a few words how the LoRA layers of a UNet on the fused path are computed.

    Args:
        unet: UNet after `use_fused_lora`.
        device: device that it runs on.
        dtype: type of its products.
    """
    layers: list[LoraLayer] = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    if not layers:
        return "none"
    count = f"{len(layers)} layers"
    if runs_plain(device):
        return f"{count} in PyTorch, as peft computes them"
    if kernel_path(device) == "torch":
        return f"{count} in PyTorch (addmm)"
    fused = 0
    for layer in layers:
        if isinstance(layer, FusedLinear) and obstacle(layer, training=True) is None:
            rank, rows = operands(layer)[0].shape[0], MIN_ROWS
            fused += choose_path(rows, layer.out_features, layer.in_features, rank, dtype, device) == "split"
    return f"{fused} of {count} in Triton kernels from {MIN_ROWS} rows on, else in PyTorch (addmm)"
