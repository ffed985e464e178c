"""Call the forward and backward pass of a LoRA linear operation by operation, for scripts that time each alone."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2f_fast.kernels import lora_kernels
from d2f_fast.kernels.lora_dispatch import Entry, NarrowEntry
from d2f_fast.kernels.lora_linear import _REFERENCES


class Operands(NamedTuple):
    """Operands of a layer: x [M, K], grad_y [M, N], weight [N, K], bias [N], a [r, K], b [N, r], s, grad_s [M, r]."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    s: Tensor
    grad_s: Tensor


def operands(rows: int, n: int, k: int, rank: int, device: torch.device, dtype: torch.dtype) -> Operands:
    """Return random operands whose products are of size 1."""

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * size).to(dtype)

    return Operands(
        random(rows, k),
        random(rows, n),
        random(n, k, size=k**-0.5),
        random(n),
        random(rank, k, size=k**-0.5),
        random(n, rank, size=rank**-0.5),
        random(rows, rank),
        random(rows, rank),
    )


class Ops(NamedTuple):
    """The five operations of a layer, by one implementation."""

    shrink: Callable[..., Tensor]
    forward: Callable[..., Tensor]
    ds_db: Callable[..., tuple[Tensor, Tensor]]
    da: Callable[..., Tensor]
    dx: Callable[..., Tensor]


ADDMM = Ops(
    *(_REFERENCES[f"lora_{name}"] for name in ("shrink", "forward", "backward_ds_db", "backward_da", "backward_dx"))
)


def split(entry: Entry, narrow: NarrowEntry) -> Ops:
    """Return the operations by the Triton kernels with these blocks."""

    def ds_db(grad_y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if narrow.grad_b is not None:
            return lora_kernels.launch_backward_ds_db(grad_y, s, b, narrow.grad_b, one_pass=True)
        rank = b.shape[1]
        grad_s = lora_kernels._launch_narrow(grad_y, b.contiguous(), rank, (1, rank), narrow.shrink)
        return grad_s, lora_kernels._launch_rows_sum(grad_y, s, narrow.rows_sum)

    return Ops(
        functools.partial(lora_kernels.launch_shrink, tile=narrow.shrink),
        functools.partial(lora_kernels.launch_forward, tile=entry.forward),
        ds_db,
        functools.partial(lora_kernels.launch_backward_da, tile=narrow.rows_sum),
        functools.partial(lora_kernels.launch_backward_dx, tile=entry.grad_x),
    )


def run_forward(ops: Ops, o: Operands) -> tuple[Tensor, ...]:
    """Compute forward, and return s and y."""
    s = ops.shrink(o.x, o.a)
    return s, ops.forward(o.x, o.weight, o.bias, s, o.b)


def run_step(ops: Ops, o: Operands) -> tuple[Tensor, ...]:
    """Compute forward and backward, and return y, dx, dA and dB."""
    s, y = run_forward(ops, o)
    grad_s, grad_b = ops.ds_db(o.grad_y, s, o.b)
    return y, ops.dx(o.grad_y, o.weight, grad_s, o.a), ops.da(grad_s, o.x), grad_b


def run_base(o: Operands) -> tuple[Tensor, ...]:
    """Compute the layer without an adapter forward and backward, and return y and dx."""
    return F.linear(o.x, o.weight, o.bias), o.grad_y @ o.weight


def errors_of(ops: Ops, o: Operands) -> list[float]:
    """Return the relative differences (Frobenius norm) of y, dx, dA and dB from float64."""
    exact = run_step(ADDMM, Operands(*(tensor.double() for tensor in o)))
    return [_difference(got, want) for got, want in zip(run_step(ops, o), exact, strict=True)]


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
