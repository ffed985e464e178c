"""LoRA linear: the product of a linear layer and its LoRA adapter as one differentiable operation.

    y  = x Wᵀ + bias + s bᵀ        s = x aᵀ, a = A, b = scale B            LoRA, arXiv 2106.09685, equation 3
    ds = dy b        dx = dy W + ds a        dB = scale dyᵀ s        dA = dsᵀ x

x [M, K], weight W [N, K], bias [N], A [r, K], B [N, r]. A and B are float32 master weights; a and b are rounded once to
the type of the product, after the scale is folded in. s and ds are rounded to that type; dA and dB come out float32.
Backward needs x, s and references to the weights. Neither x nor dy is ever written to.

Where fusion pays (`lora_dispatch.py`), products run in the Triton kernels of `lora_kernels.py` ("split": the adapter is
added in the accumulator of the base product), elsewhere in cuBLAS ("addmm"). Both have the same gradients and save the
same tensors.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from d2f_fast.kernels import lora_kernels
from d2f_fast.kernels.lora_dispatch import ComputePath, choose_path
from d2f_fast.kernels.runtime import AUTOCAST_DEVICES, STORED_DTYPES, autocasts, library, triton_available

_DTYPES = (*STORED_DTYPES, torch.float64)
_Fake = TypeVar("_Fake", bound=Callable[..., object])


def lora_linear_reference(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return y in plain torch; the operands have one dtype, and x any leading dimensions."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b) * scale


def _shrink(x: Tensor, a: Tensor) -> Tensor:
    return x @ a.t()


# The two functions that add in place are also ops: Inductor turns a plain addmm_ into an addmm that first copies the
# base product.
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, weight, bias).addmm_(s, b.t())


def _backward_ds_db(grad_y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return grad_y @ b, _transposed_product(grad_y, s)


def _backward_dx(grad_y: Tensor, weight: Tensor, grad_s: Tensor, a: Tensor) -> Tensor:
    return (grad_y @ weight).addmm_(grad_s, a)


def _backward_da(grad_s: Tensor, x: Tensor) -> Tensor:
    return _transposed_product(grad_s, x)


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ right, in float32 where the operands are 16-bit."""
    if left.dtype not in (torch.float16, torch.bfloat16):
        return left.t() @ right
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.t().float() @ right.float()


library.define("lora_shrink(Tensor x, Tensor a) -> Tensor")
for _path in ("", "_addmm"):
    library.define(f"lora_forward{_path}(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor b) -> Tensor")
    library.define(f"lora_backward_dx{_path}(Tensor grad_y, Tensor weight, Tensor grad_s, Tensor a) -> Tensor")
library.define("lora_backward_ds_db(Tensor grad_y, Tensor s, Tensor b) -> (Tensor, Tensor)")
library.define("lora_backward_da(Tensor grad_s, Tensor x) -> Tensor")

_REFERENCES = {
    "lora_shrink": _shrink,
    "lora_forward": _forward,
    "lora_backward_ds_db": _backward_ds_db,
    "lora_backward_dx": _backward_dx,
    "lora_backward_da": _backward_da,
}
_LAUNCHES = {
    "lora_shrink": lora_kernels.launch_shrink,
    "lora_forward": lora_kernels.launch_forward,
    "lora_backward_ds_db": lora_kernels.launch_backward_ds_db,
    "lora_backward_dx": lora_kernels.launch_backward_dx,
    "lora_backward_da": lora_kernels.launch_backward_da,
}
for _name, _reference in _REFERENCES.items():
    library.impl(_name, _reference, "CPU")
    library.impl(_name, _LAUNCHES[_name] if triton_available() else _reference, "CUDA")
for _name, _reference in (("lora_forward_addmm", _forward), ("lora_backward_dx_addmm", _backward_dx)):
    library.impl(_name, _reference, "CPU")
    library.impl(_name, _reference, "CUDA")


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(name: str) -> Callable[[_Fake], _Fake]:
    register: Callable[[_Fake], _Fake] = torch.library.register_fake(f"d2f_fast::{name}", lib=library)
    return register


@_fake("lora_shrink")
def _(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@_fake("lora_forward")
@_fake("lora_forward_addmm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("lora_backward_ds_db")
def _(grad_y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rows, rank = s.shape
    return grad_y.new_empty(rows, rank), b.new_empty(b.shape, dtype=_wide_dtype(b.dtype))


@_fake("lora_backward_dx")
@_fake("lora_backward_dx_addmm")
def _(grad_y: Tensor, weight: Tensor, grad_s: Tensor, a: Tensor) -> Tensor:
    return grad_y.new_empty(grad_y.shape[0], weight.shape[1])


@_fake("lora_backward_da")
def _(grad_s: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad_s.shape[1], x.shape[1], dtype=_wide_dtype(x.dtype))


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if device.type in AUTOCAST_DEVICES else nullcontext()


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        path: ComputePath,
    ) -> Tensor:
        op = torch.ops.d2f_fast
        with _without_autocast(x.device):
            a, b = lora_a.to(x.dtype), (lora_b if scale == 1 else lora_b * scale).to(x.dtype)
            s = op.lora_shrink(x, a) if path == "split" else _shrink(x, a)
            y: Tensor = (op.lora_forward if path == "split" else op.lora_forward_addmm)(x, weight, bias, s, b)
        x_grad, weight_grad, _, a_grad, b_grad, *_ = ctx.needs_input_grad
        # Only what some gradient needs is kept: the weight of packed layers is a copy, and text needs no gradient.
        kept = (x, weight_grad or a_grad), (s, b_grad), (weight, x_grad), (a, x_grad), (b, x_grad or a_grad or b_grad)
        ctx.save_for_backward(*(tensor if needed else None for tensor, needed in kept))
        ctx.scale, ctx.path, ctx.master_dtypes = scale, path, (lora_a.dtype, lora_b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, a, b = ctx.saved_tensors
        x_grad, weight_grad, bias_grad, a_grad, b_grad, *_ = ctx.needs_input_grad
        a_dtype, b_dtype = ctx.master_dtypes
        op, split = torch.ops.d2f_fast, ctx.path == "split"
        grad_x = grad_weight = grad_bias = grad_a = grad_b = None
        grad_s: Tensor
        with _without_autocast(grad_y.device):
            if b_grad:
                grad_s, grad_b = op.lora_backward_ds_db(grad_y, s, b) if split else _backward_ds_db(grad_y, s, b)
                grad_b = (grad_b if ctx.scale == 1 else grad_b * ctx.scale).to(b_dtype)
            elif x_grad or a_grad:
                grad_s = grad_y @ b
            if a_grad:
                grad_a = (op.lora_backward_da(grad_s, x) if split else _backward_da(grad_s, x)).to(a_dtype)
            if x_grad:
                backward_dx = op.lora_backward_dx if split else op.lora_backward_dx_addmm
                grad_x = backward_dx(grad_y, weight, grad_s, a)
            if weight_grad:
                grad_weight = grad_y.t() @ x
            if bias_grad:
                grad_bias = grad_y.sum(0)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Apply a linear layer and its LoRA adapter.

        y = F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b) * scale

    The product is computed in autocast's type under autocast, otherwise in x's. A and B are cast to that type; their
    gradients have their own types.

    Args:
        x: input, [..., K] float32, float16, bfloat16 or float64, with any strides.
        weight: weight of the base layer, [N, K], in x's dtype (in any dtype under autocast).
        lora_a: A of the adapter, [r, K], usually float32.
        lora_b: B of the adapter, [N, r], usually float32.
        bias: bias of the base layer, [N], in the weight's dtype; None for no bias.
        scale: factor on the adapter's product, alpha / r.

    Returns:
        The layer's output, [..., N].

    Raises:
        ValueError: the operands' shapes, dtypes or devices do not fit each other.
    """
    _check_operands(x, weight, lora_a, lora_b, bias)
    if isinstance(scale, Tensor):  # a tensor would silently get no gradient
        raise ValueError("scale must be a number, got a tensor: multiply lora_b by it")
    if torch.compiler.is_exporting():
        return lora_linear_reference(x, weight, lora_a.to(x.dtype), lora_b.to(x.dtype), bias, scale)
    cast = autocasts(x)
    if weight.dtype != x.dtype and not cast:
        raise ValueError(f"weight must be of x's dtype {x.dtype}, got {weight.dtype}: cast one, or use autocast")
    dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
    (n, k), rank = weight.shape, lora_a.shape[0]
    rows = x.reshape(-1, k).to(dtype)
    path = choose_path(rows.shape[0], n, k, rank, dtype, x.device)
    if path == "split":
        rows = rows.contiguous()  # only once: these rows are saved for backward too
    apply: Callable[..., Tensor] = _LoRALinear.apply
    y = apply(rows, weight.to(dtype), None if bias is None else bias.to(dtype), lora_a, lora_b, scale, path)
    return y.view(*x.shape[:-1], n)


def lora_linear_packed(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    scales: Sequence[float] | None = None,
) -> tuple[Tensor, ...]:
    """Apply several linear layers with LoRA adapters to one x, for example q, k and v of an attention layer.

        tuple(lora_linear(x, w, a, b, bias_i, scale) for …)

    x is read once: there is one product with all weights, one with all A and one with the block diagonal of all B. The
    results are the same but for the order in which sums are rounded.

    Args:
        x: input of every layer, [..., K].
        weight: concatenated weights, [N_1 + N_2 + …, K], or the weights [N_i, K], which are concatenated at each call:
            it is faster to concatenate frozen weights once.
        lora_as: A of each adapter, [r_i, K].
        lora_bs: B of each adapter, [N_i, r_i].
        bias: concatenated biases, [N_1 + N_2 + …], or the bias of every layer; None for no bias.
        scales: factor on each adapter's product; None for 1.

    Returns:
        The output of each layer, [..., N_i], as views of one tensor.

    Raises:
        ValueError: the operands' shapes, dtypes or devices do not fit each other.
    """
    scales = [1.0] * len(lora_bs) if scales is None else list(scales)
    if not 0 < len(lora_as) == len(lora_bs) == len(scales):
        raise ValueError(
            f"lora_as, lora_bs and scales must be of one length, got {len(lora_as)}, {len(lora_bs)} and {len(scales)}"
        )
    for a, b in zip(lora_as, lora_bs, strict=True):
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(f"each B must be [N, r] for its A [r, K], got {list(b.shape)} and {list(a.shape)}")
    # Weights in the wrong order would have the right shape once they are packed, so their order is checked here.
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and not isinstance(given, Tensor):
            features, wanted = [len(tensor) if tensor.ndim else 0 for tensor in given], [len(b) for b in lora_bs]
            if features != wanted:
                raise ValueError(f"{name} must have {wanted} features like the B, got {features}")
    packed_weight = weight if isinstance(weight, Tensor) else torch.cat(list(weight))
    packed_bias = bias if bias is None or isinstance(bias, Tensor) else torch.cat(list(bias))
    scaled = [b if scale == 1 else b * scale for b, scale in zip(lora_bs, scales, strict=True)]
    y = lora_linear(x, packed_weight, torch.cat(list(lora_as)), torch.block_diag(*scaled), packed_bias)
    outputs: tuple[Tensor, ...] = y.split([b.shape[0] for b in lora_bs], -1)
    return outputs


def _check_operands(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    """Refuse operands that would broadcast, be cast silently, or reach a kernel from another device."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"x must be [..., K] for a weight [N, K] with elements, got {list(x.shape)} and {list(weight.shape)}"
        )
    n, k = weight.shape
    if lora_a.ndim != 2 or lora_a.shape[1] != k or lora_a.shape[0] < 1:
        raise ValueError(f"lora_a must be [r, {k}] with r of 1 or more, got {list(lora_a.shape)}")
    if lora_b.shape != (n, lora_a.shape[0]):
        raise ValueError(f"lora_b must be [{n}, {lora_a.shape[0]}], got {list(lora_b.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got {list(bias.shape)}")
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": x if bias is None else bias}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
