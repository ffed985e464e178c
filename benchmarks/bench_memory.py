"""Count the bytes that a training step of Stable Diffusion 1.5 with LoRA keeps for its backward pass.

    pytest --benchmark benchmarks/bench_memory.py

Providers: peft's layers, and the same network under `use_fused_lora`. The bytes are those of one image of 64 x 64
latents, found from shapes: nothing is computed, so that it runs on any machine in minutes. "eager" counts what autograd
saves, "compiled" what the forward graph hands to the backward graph after AOTAutograd's partition. Parameters do not
count.

    scripts   bfloat16 base, float32 adapters, bfloat16 autocast, as diffusers' training scripts run it
    fp32      everything float32, where no cast is saved and only inputs of frozen convolutions can be left out
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensor, FakeTensorMode

from benchmarks.unets import SD15
from d2f_fast import use_fused_lora
from d2f_fast.lora.inject import inject_lora

RANK, MIB = 16, 2**20
PRECISIONS = {"scripts": (torch.bfloat16, True), "fp32": (torch.float32, False)}
TARGETS: dict[str, dict[str, Any]] = {
    "attention and feed-forward": {},
    "convolutions too": {"conv_rank": RANK},
}
# Least share of the bytes that must be saved under "scripts". Under "fp32" with adapted convolutions none can be.
GATES = {"eager": 0.14, "compiled": 0.10}
Inputs = tuple[Tensor, Tensor, Tensor]


class _Measured(Exception):
    """Stop before the graphs run, once they are known."""


def sd15(dtype: torch.dtype, **options: Any) -> Any:
    """Return the UNet with LoRA, whose memory is reserved and never touched."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SD15)
            inject_lora(unet, RANK, **options)
    finally:
        torch.set_default_dtype(before)
    return unet.to_empty(device="cpu").to(memory_format=torch.channels_last)


def eager_bytes(unet: Any, inputs: Inputs) -> int:
    """Return the bytes that autograd saves, counting each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        # The list keeps the parameters alive, whose storage their views share.
        parameters = [fakes.from_tensor(parameter) for parameter in unet.parameters()]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(*(fakes.from_tensor(tensor) for tensor in inputs))
        own = {parameter.untyped_storage()._cdata for parameter in parameters}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def compiled_bytes(unet: Any, inputs: Inputs) -> int:
    """Return the bytes that the compiled forward returns beside its output, counting each storage once."""
    kept: dict[int, int] = {}

    def measure(graph: torch.fx.GraphModule, _: Any) -> Any:
        given = {storage._cdata for node in graph.graph.nodes if node.op == "placeholder" for storage in storages(node)}
        for node in graph.graph.output_node().args[0][1:]:
            kept.update({s._cdata: s.nbytes() for s in storages(node) if s._cdata not in given})
        raise _Measured

    def storages(node: Any) -> list[torch.UntypedStorage]:
        value = node.meta.get("val")
        return [value.untyped_storage()] if isinstance(value, Tensor) else []

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=measure, bw_compiler=measure, partition_fn=min_cut_rematerialization_partition)
    with pytest.raises(Exception, match="_Measured"):
        torch.compile(unet, fullgraph=True, backend=backend)(*inputs)
    torch.compiler.reset()
    return sum(kept.values())


MODES: dict[str, Callable[[Any, Inputs], int]] = {"eager": eager_bytes, "compiled": compiled_bytes}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("targets", TARGETS)
def test_memory(benchmark: Any, capsys: Any, mode: str, precision: str, targets: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    unet = sd15(dtype, **TARGETS[targets])
    like = {"dtype": dtype}
    inputs = torch.zeros(1, 4, 64, 64, **like), torch.zeros(1), torch.zeros(1, 77, 768, **like)
    inputs[0].data = inputs[0].to(memory_format=torch.channels_last)

    def measure() -> tuple[int, int]:
        with torch.autocast("cpu", dtype) if autocast else nullcontext():
            peft = MODES[mode](unet, inputs)
            with use_fused_lora(unet):
                return peft, MODES[mode](unet, inputs)

    peft, ours = benchmark.pedantic(measure)
    row = {"peft_mib": round(peft / MIB, 1), "ours_mib": round(ours / MIB, 1), "saved": round(1 - ours / peft, 3)}
    benchmark.extra_info.update(row)
    with capsys.disabled():
        print("\n" + json.dumps({"mode": mode, "precision": precision, "targets": targets, **row}))
    assert precision != "scripts" or 1 - ours / peft >= GATES[mode]
