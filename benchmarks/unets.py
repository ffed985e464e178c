"""Build the networks that are measured, and count the least work of a training step of each.

The networks have their real sizes, from their configurations, and random weights; nothing is downloaded.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from d2f_fast.lora.inject import inject_lora
from d2f_fast.miniature import MINIATURE

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sd15 halved": {**SD15, "block_out_channels": (160, 320, 640, 640)},
    "sd21": {
        **SD15,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "miniature": json.loads((MINIATURE / "unet" / "config.json").read_text()),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # layers that the diffusers scripts adapt


@dataclasses.dataclass(frozen=True)
class Case:
    """One network at one size, with the adapter that is trained.

    Args:
        network: key of CONFIGS.
        batch: images per step.
        side: height and width of the latents.
        rank: rank of the adapter.
        targets: name endings of the layers that are adapted; None for attention, feed-forward and projections.
        checkpointing: Recompute activations in the backward pass.
        dtype: type of the frozen weights; A and B are float32.
    """

    network: str
    batch: int
    side: int
    rank: int = 16
    targets: tuple[str, ...] | None = ATTENTION
    checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32

    def __str__(self) -> str:
        """Return the name of this case in the rows."""
        parts = [self.network, f"r{self.rank}", f"b{self.batch}", f"{self.side}x{self.side}"]
        parts += [] if self.targets == ATTENTION else ["all linear"]
        parts += ["checkpointed"] if self.checkpointing else []
        return " ".join([*parts, str(self.dtype).removeprefix("torch.")])


def build(case: Case, device: torch.device | str) -> Any:
    """Return the network without an adapter, channels first, with the same weights at every call."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel.from_config(CONFIGS[case.network])
    finally:
        torch.set_default_dtype(before)
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.requires_grad_(False)


@torch.no_grad()
def set_adapter(trainable: Mapping[str, nn.Parameter]) -> None:
    """Give A and B random values that depend on their names alone; B is not zero, or A would have no gradient."""
    for name in sorted(trainable):
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        values = torch.randn(trainable[name].shape, generator=generator)
        trainable[name].copy_(values * (0.02 if "lora_B" in name else trainable[name].shape[1] ** -0.5))


def batch_of(case: Case, device: torch.device | str) -> dict[str, Any]:
    """Return a batch for `AlignedTrainer.step`: latents, text and, for SDXL, its added condition."""
    config, generator = CONFIGS[case.network], torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, generator=generator).to(device)

    batch = {
        "latents": random(4, case.side, case.side),
        "encoder_hidden_states": random(77, config["cross_attention_dim"]).to(case.dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        size = 8.0 * case.side
        time_ids = torch.tensor([size, size, 0, 0, size, size], device=device, dtype=case.dtype)
        batch["added_cond_kwargs"] = {
            "text_embeds": random(pooled).to(case.dtype),
            "time_ids": time_ids.expand(case.batch, -1),
        }
    return batch


@dataclasses.dataclass(frozen=True)
class Work:
    """The operations and bytes of each product, convolution and attention of a step."""

    parts: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> int:
        """Return the operations of a step."""
        return sum(flops for flops, _ in self.parts)

    @property
    def bytes_moved(self) -> int:
        """Return the bytes that a step reads and writes."""
        return sum(moved for _, moved in self.parts)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the least seconds: each part takes the slower of arithmetic and memory, all else takes no time."""
        return sum(max(flops / flops_per_s, moved / bytes_per_s) for flops, moved in self.parts)


@functools.cache
def least_work(case: Case, adapter: bool = True) -> Work:
    """Return the least work of one step of a case, found from shapes without computing anything.

    Each product, convolution and attention, forward and backward, reads its operands once and writes its result once.
    Norms and activations are assumed to be fused into them. A convolution's backward pass does not read the input,
    which only the gradient of its frozen weight would need.

    Args:
        case: network, sizes and adapter.
        adapter: Train the adapter. Without it, the gradient of the latents is computed so that there is a backward
            pass.
    """
    case = dataclasses.replace(case, checkpointing=False)
    counter, unet = _Counter(), build(case, "meta")
    if adapter:
        inject_lora(unet, case.rank, target_modules=case.targets)
    unet.to_empty(device="cpu")  # the memory is reserved and never touched
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = batch_of(case, "cpu")
        sample = batch["latents"].to(case.dtype).requires_grad_(not adapter)
        added = batch.get("added_cond_kwargs")
        autocast = torch.autocast("cpu", case.dtype, enabled=case.dtype != torch.float32)
        with counter, autocast:
            output = unet(sample, torch.zeros(case.batch), batch["encoder_hidden_states"], added_cond_kwargs=added)
            output.sample.float().sum().backward()
    return Work(tuple(counter.parts))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = _FLOPS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if count is not None:
            operands = list(args)
            if func.overloadpacket is torch.ops.aten.convolution_backward and not args[-1][1]:
                operands[1] = None
            tensors = [x for x in (*tree_leaves(operands), *tree_leaves(result)) if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            self.parts.append((int(count(*args, **kwargs, out_val=result)), moved))
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# Attention on CPUs, which torch's own table of operations lacks.
_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
