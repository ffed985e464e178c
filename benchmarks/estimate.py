"""Estimate the GPU memory and the time that one training step of Stable Diffusion needs; nothing is measured.

    python -m benchmarks.estimate                    # prints the table of README.md, in about two minutes

Shapes alone are enough: networks are built from their real configurations on torch's meta device, whose tensors have a
size and no content, and one forward and one backward pass run there. So the command needs neither weights nor a GPU.

    memory = weights + AdamW's moments + moving average + frozen encoders
             + the larger of: peak of all that the two passes allocate, gradients included;
                              gradients and one group of the moving average's differences, when weights are updated
    time   = operations of the two passes / (36 % of the card's bfloat16 peak)

Memory follows `d2f train --mixed_precision bf16` without --compile: the frozen weights of LoRA training are bfloat16,
all trained weights, their gradients, AdamW's two moments and the moving average are float32, and the autoencoder and
the text encoders stay on the card in float32. Not counted: the CUDA context (about 0.5 GB), the workspaces of cuDNN,
and the gaps that an allocator leaves. The share of 36 % is what MLPerf's fastest full training run of Stable Diffusion
2 reached on H200 cards, whose peak is that of the H100, with tuned kernels: real runs on other machines are slower.
A time is left out where the run needs more memory than the card has.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from benchmarks.unets import CONFIGS
from d2f_fast import use_fused_lora
from d2f_fast.kernels import lora_linear
from d2f_fast.layers import frozen_conv, fused_layers, packed_attention
from d2f_fast.lora.inject import inject_lora
from d2f_fast.training.ema import MOST_ELEMENTS

GB = 1e9
PEAK_FRACTION = 0.36
# Dense bfloat16 operations per second with float32 accumulation, and memory in GB, from NVIDIA's data sheets.
CARDS = {"RTX 4090": 165e12, "H100": 989e12}
CARD_MEMORY = {"RTX 4090": 24, "H100": 80}
# Parameters of the autoencoder and the text encoders, which stay on the card beside the UNet.
ENCODER_PARAMETERS = {"sd15": 83_653_863 + 123_060_480, "sdxl": 83_653_863 + 123_060_480 + 694_659_840}
NAMES = {"sd15": "SD1.5, 512 px", "sdxl": "SDXL, 1024 px"}
PRECISION = torch.bfloat16
BATCHES = (1, 4)
# The passes run once, with a batch whose size divides no weight's size: a tensor that it divides grows with the batch.
MARKED_BATCH = 7


@dataclass(frozen=True)
class Run:
    """One way to train one network at the size of its own images.

    Args:
        network: key of `benchmarks.unets.CONFIGS`.
        rank: rank of the LoRA layers on attention and feed-forward; None trains every weight.
        checkpointing: whether activations are computed again in the backward pass instead of kept.
    """

    network: str
    rank: int | None = 64
    checkpointing: bool = False


@dataclass(frozen=True)
class Estimate:
    """Requirements of one training step.

    Attributes:
        state_bytes: weights, AdamW's moments, moving average and frozen encoders.
        pass_bytes: most bytes that the forward and the backward pass hold at once beside the state, by batch size:
            activations, gradients and temporary results.
        update_bytes: bytes held beside the state while the weights are updated.
        image_operations: floating-point operations for each image; a multiplication and an addition are two.
    """

    state_bytes: int
    pass_bytes: Mapping[int, int]
    update_bytes: int
    image_operations: int

    def memory_gb(self, batch: int) -> float:
        """Return the GPU memory that the run needs with a batch of `BATCHES`, in 10⁹ bytes."""
        return (self.state_bytes + max(self.pass_bytes[batch], self.update_bytes)) / GB

    def seconds(self, batch: int, card: str) -> float:
        """Return the time of one step on a card of `CARDS`, in seconds."""
        return batch * self.image_operations / (PEAK_FRACTION * CARDS[card])

    def time_cell(self, batch: int, card: str) -> str:
        """Return the table's text for the time of one step, or that the run does not fit in the card's memory."""
        if self.memory_gb(batch) > CARD_MEMORY[card]:
            return f"does not fit in {CARD_MEMORY[card]} GB"
        return f"{self.seconds(batch, card):.2g} s"


def estimate(run: Run) -> Estimate:
    """Estimate what one training step of a run needs, from shapes alone."""
    unet = _build(run.network, run.rank)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    encoders = 4 * ENCODER_PARAMETERS.get(run.network, 0)
    if run.checkpointing:
        # The backward pass leaves the function mode, which is entered again where activations are recomputed.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        options["context_fn"] = lambda: (nullcontext(), GpuAutocast())
        unet.enable_gradient_checkpointing(partial(checkpoint, **options))
    else:
        unet.disable_gradient_checkpointing()
    with GpuAutocast(), Tally(list(unet.parameters())) as tally:
        _run_passes(unet)
    unet.zero_grad(set_to_none=True)
    return Estimate(
        state_bytes=weights + encoders + 3 * 4 * trained,
        pass_bytes=tally.peaks,
        update_bytes=4 * trained + 4 * min(trained, MOST_ELEMENTS),
        image_operations=tally.operations // MARKED_BATCH,
    )


class Tally(TorchDispatchMode):
    """Count the operations inside the block, and follow the bytes of all tensors that they make.

    Args:
        counted: tensors whose bytes are counted elsewhere, as are those of their views.

    Attributes:
        operations: floating-point operations of products, convolutions and attention, for `MARKED_BATCH` images.
        peaks: most bytes that were alive at once, by batch size.
    """

    def __init__(self, counted: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations = self._fixed = self._per_image = 0
        self.peaks = dict.fromkeys(BATCHES, 0)
        self._counted = counted  # held, or another tensor could be given the same address
        self._alive = {tensor.untyped_storage()._cdata for tensor in counted}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._alive:
                self._follow(tensor.untyped_storage())
        packet = func.overloadpacket
        if packet in _OPERATIONS:
            self.operations += _OPERATIONS[packet](*args)
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count the bytes of a new storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self._change(size)
        self.peaks = {batch: max(peak, self._fixed + batch * self._per_image) for batch, peak in self.peaks.items()}
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        """Stop counting the bytes of a storage that was freed."""
        self._alive.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        """Add bytes to those that are alive."""
        if size % MARKED_BATCH:
            self._fixed += size
        else:
            self._per_image += size // MARKED_BATCH


class GpuAutocast(TorchFunctionMode):
    """Do to meta tensors inside the block what bfloat16 autocast does to those of a GPU.

    Products take bfloat16 and normalisations float32; attention is the one of torch that keeps no matrix of scores.
    """

    def __enter__(self) -> "GpuAutocast":
        self._patches = ExitStack()
        for module in (lora_linear, frozen_conv, fused_layers, packed_attention):
            self._patches.enter_context(mock.patch.object(module, "autocasts", lambda x: True))
        self._patches.enter_context(mock.patch.object(torch, "get_autocast_dtype", lambda device: PRECISION))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, key, value = args
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        dtype = _AUTOCAST_TYPES.get(func)
        if dtype is not None:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (args, kwargs))
        return func(*args, **kwargs)


# Types that CUDA's autocast gives to the operands of the functions that a UNet calls.
_AUTOCAST_TYPES = {
    functional.linear: PRECISION,
    functional.conv2d: PRECISION,
    functional.group_norm: torch.float32,
    functional.layer_norm: torch.float32,
}


# Operations of this package's fused LoRA layers, which torch's own table lacks.
_OPERATIONS: dict[Any, Callable[..., int]] = {
    torch.ops.d2f_fast.lora_shrink: lambda x, a: 2 * x.numel() * len(a),
    torch.ops.d2f_fast.lora_backward_da: lambda grad_s, x: 2 * x.numel() * grad_s.shape[-1],
    torch.ops.d2f_fast.lora_backward_ds_db: lambda grad_y, s, b: 4 * grad_y.numel() * s.shape[-1],
}
for _path in ("", "_addmm"):
    _OPERATIONS |= {
        getattr(torch.ops.d2f_fast, f"lora_forward{_path}"): (
            lambda x, weight, bias, s, b: 2 * (x.numel() + s.numel()) * len(weight)
        ),
        getattr(torch.ops.d2f_fast, f"lora_backward_dx{_path}"): (
            lambda grad_y, weight, grad_s, a: 2 * (grad_y.numel() + grad_s.numel()) * a.shape[-1]
        ),
    }


@cache
def _build(network: str, rank: int | None) -> Any:
    """Return the network with frozen weights in bfloat16 and trained ones in float32."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(CONFIGS[network])
        if rank is not None:
            inject_lora(unet, rank)
    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else PRECISION)
    if rank is not None:
        use_fused_lora(unet)
    return unet.train()


def _run_passes(unet: Any) -> None:
    """Run one forward and one backward pass of the network as a training step does, on `MARKED_BATCH` images."""
    config = unet.config
    with torch.device("meta"):
        text = torch.zeros(MARKED_BATCH, 77, config.cross_attention_dim, dtype=PRECISION)
        sample = torch.zeros(MARKED_BATCH, config.in_channels, config.sample_size, config.sample_size)
        timestep, added = torch.zeros(MARKED_BATCH), None
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {
                "text_embeds": torch.zeros(MARKED_BATCH, pooled, dtype=PRECISION),
                "time_ids": torch.zeros(MARKED_BATCH, 6),
            }
    output = unet(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=added).sample
    output.float().square().mean().backward()


def table(estimates: Mapping[Run, Estimate]) -> list[str]:
    """Return the lines of the Markdown table."""
    columns = [f"memory, batch {batch}" for batch in BATCHES]
    columns += [f"time a step of {BATCHES[-1]} images, {card}" for card in CARDS]
    lines = [
        f"| model | training | gradient checkpointing | {' | '.join(columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for run, needs in estimates.items():
        cells = [NAMES[run.network], "full" if run.rank is None else f"LoRA, rank {run.rank}"]
        cells.append("on" if run.checkpointing else "off")
        cells += [f"{needs.memory_gb(batch):.1f} GB" for batch in BATCHES]
        cells += [needs.time_cell(BATCHES[-1], card) for card in CARDS]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


RUNS = [
    Run(network, rank, checkpointing) for network in NAMES for rank in (64, None) for checkpointing in (False, True)
]


if __name__ == "__main__":
    print(*table({run: estimate(run) for run in RUNS}), sep="\n")
