"""Measure a linear layer with a LoRA adapter, forward and backward.

    pytest --benchmark benchmarks/bench_lora_linear.py

The base weight is frozen and has the type of the product; A and B are float32. Providers:

    base only           the layer without an adapter
    peft eager          peft's layer as the diffusers scripts run it, under autocast on a GPU
    peft no input cast  the same without the cast of its input to the type of A
    peft compiled       the same by torch.compile
    torch compiled      the formula in plain torch by torch.compile
    addmm               `lora_linear` restricted to cuBLAS
    transformer engine  Transformer Engine's fused LoRA linear, where it is installed
    d2f_fast            `lora_linear` with its dispatch table

On a CPU everything is float32 without autocast: the second peft row equals the first, and `lora_linear` always takes
addmm. Outputs and gradients are compared with float64 before they are timed. The ceiling is the slower of copying the
least bytes and multiplying, so that a row's share of it is the larger of share_of_copy and share_of_matmul.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.kernels.lora_linear import lora_linear, lora_linear_reference

CUDA = torch.cuda.is_available()
DTYPE, ROUNDING = (torch.bfloat16, 2.0**-8) if CUDA else (torch.float32, 2.0**-24)
GRAPHS = [True, False] if CUDA else [False]
# Rows, output features, input features and rank. On a GPU they are those of SD1.5 for sixteen images of 64 x 64 latents
# (attention on three levels, the feed-forward of the first, the text's keys), and of SDXL's attention for four images
# of 128 x 128 latents. On a CPU they are those of one image of 16 x 16 latents.
CASES = [(256, 320, 320, 16), (16, 1280, 1280, 16)]
if CUDA:
    CASES = [(65536, 320, 320, 16), (65536, 320, 320, 64), (16384, 640, 640, 16), (4096, 1280, 1280, 16)]
    CASES += [(65536, 2560, 320, 16), (65536, 320, 1280, 16), (1232, 320, 768, 16), (4096, 1280, 1280, 64)]
PROVIDERS = ["base only", "peft eager", "peft no input cast", "peft compiled", "torch compiled", "addmm"]
PROVIDERS += ["transformer engine", "d2f_fast"]


class Layer(nn.Module):
    """A linear layer that peft can wrap."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.linear: Any = nn.Linear(k, n).requires_grad_(False).to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def peft_layer(n: int, k: int, rank: int, device: torch.device) -> Layer:
    """Return a layer of peft's with a random float32 adapter of scale 1."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"], init_lora_weights=False)
    layer = inject_adapter_in_model(config, Layer(n, k)).to(device)
    layer.linear.lora_A.float()
    layer.linear.lora_B.float()
    return layer


def transformer_engine(weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Callable[[Tensor], Tensor]:
    """Return Transformer Engine's fused LoRA linear, which adds the adapter in place, forward and backward.

    This was never run, because the library was not installed where it was written. The comparison with float64 comes
    before any timing.
    """
    ops = pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed").ops

    def linear(weight: Tensor, bias: Tensor | None = None) -> Any:
        n, k = weight.shape
        op = ops.Linear(k, n, bias=bias is not None, device="meta", dtype=weight.dtype)
        op.weight, op.bias = weight, bias
        return op

    base = ops.Sequential(ops.MakeExtraOutput(in_place=True), linear(nn.Parameter(weight, False), bias))
    adapter = ops.Sequential(linear(lora_a), linear(lora_b), ops.AddExtraInput(in_place=True))

    def run(x: Tensor) -> Tensor:
        y, forked = base(x)
        return adapter(forked, y)

    return run


def provider_of(name: str, layer: Layer) -> Callable[[Tensor], Tensor]:
    """Return the function of a provider."""
    wrapped = layer.linear
    weight, bias = wrapped.base_layer.weight, wrapped.base_layer.bias
    lora_a, lora_b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight

    def autocast(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cuda", DTYPE, enabled=CUDA):
                return function(x)

        return run

    def plain(x: Tensor) -> Tensor:
        return lora_linear_reference(x, weight, lora_a.to(x.dtype), lora_b.to(x.dtype), bias)

    if name == "base only":
        return wrapped.base_layer
    if name == "peft no input cast":
        wrapped.cast_input_dtype_enabled = False  # peft.helpers.disable_input_dtype_casting sets the same
    if name == "transformer engine":
        return autocast(transformer_engine(weight, bias, lora_a, lora_b))
    if name.startswith("peft"):
        run = autocast(layer)
        return torch.compile(run, fullgraph=True, dynamic=False) if name == "peft compiled" else run
    if name == "torch compiled":
        return torch.compile(plain, fullgraph=True, dynamic=False)
    return lambda x: lora_linear(x, weight, lora_a, lora_b, bias)


def least_work(rows: int, n: int, k: int, rank: int) -> tuple[int, int]:
    """Return the least bytes moved and the operations of a forward and backward pass; rank 0 has no adapter.

    x is read and y written; then dy is read, dx written, and x read again for dA. The weight is read twice. The adapter
    adds s = x Aᵀ, which is written and read; A and B, which are read forward and backward; and their gradients, which
    are written, all three in float32.
    """
    adapted = int(rank > 0)
    elements = rows * ((2 + adapted) * k + 2 * n + 2 * rank) + 2 * n * k + n
    moved = elements * DTYPE.itemsize + 3 * rank * (n + k) * torch.float32.itemsize
    return moved, 4 * rows * n * k + 6 * rows * rank * (n + k)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: "graph" if graph else "launched")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_lora_linear(measure, device, monkeypatch, case, provider, graph):
    rows, n, k, rank = case
    torch._dynamo.reset()
    if provider == "addmm":
        monkeypatch.setenv(PATH_VARIABLE, "addmm")
    layer = peft_layer(n, k, rank, device)
    function, wrapped = provider_of(provider, layer), layer.linear
    adapter = [] if provider == "base only" else [wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight]

    def inputs() -> tuple[Tensor, Tensor]:
        x, grad_y = (torch.randn(rows, features, device=device).to(DTYPE) for features in (k, n))
        return x.requires_grad_(), grad_y

    def run(x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        y = function(x)
        return y, *torch.autograd.grad(y, [x, *adapter], grad_y)

    x, grad_y = inputs()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *adapter)]
    weight, bias = (tensor.double() for tensor in (wrapped.base_layer.weight, wrapped.base_layer.bias))
    y = lora_linear_reference(exact[0], weight, *exact[1:], bias) if adapter else exact[0] @ weight.t() + bias
    for got, expected in zip(run(x, grad_y), (y, *torch.autograd.grad(y, exact, grad_y.double())), strict=True):
        # In bfloat16, A or B, s or ds, and the result are rounded; in float32, sums of thousands of products are.
        error, allowed = (got - expected).norm() / expected.norm(), (2 if CUDA else 20) * ROUNDING
        assert error <= allowed, f"{provider} is {error:.1e} from float64, {allowed:.1e} allowed"
    del exact, y, expected

    name = f"{rows}x{n}x{k} r{rank} {str(DTYPE).removeprefix('torch.')}"
    moved, flops = least_work(rows, n, k, rank if adapter else 0)
    measure(run, inputs, case=name, provider=provider, bytes_moved=moved, flops=flops, graph=graph)
