"""A LoRA linear, forward and backward: base product alone, plain torch in peft's order, the same compiled, and ours.

SD1.5's self-attention projection at rank 16; on a CPU one picture of 16 x 16 latents, on a GPU sixteen of 64 x 64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2f_fast.kernels.lora_linear import lora_linear, lora_linear_reference

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
ROWS, FEATURES, RANK = (16 * 4096 if CUDA else 256), 320, 16


def base_only(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def plain(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
    return lora_linear_reference(x, weight, lora_a.to(x.dtype), lora_b.to(x.dtype), bias)


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "base_only": base_only,
    "plain": plain,
    "plain_compiled": torch.compile(plain, fullgraph=True),
    "ours": lora_linear,
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_lora_linear(benchmark: Any, provider: str) -> None:
    def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype) / shape[-1] ** 0.5

    x = random(ROWS, FEATURES).requires_grad_()
    weight, bias = random(FEATURES, FEATURES), random(FEATURES)
    lora_a = random(RANK, FEATURES, dtype=torch.float32).requires_grad_()
    lora_b = random(FEATURES, RANK, dtype=torch.float32).requires_grad_()
    operands, upstream = (x, weight, lora_a, lora_b, bias), torch.randn(ROWS, FEATURES, device=DEVICE, dtype=DTYPE)
    wanted = [x] if provider == "base_only" else [x, lora_a, lora_b]

    def step() -> tuple[Tensor, ...]:
        y = PROVIDERS[provider](*operands)
        gradients = torch.autograd.grad(y, wanted, upstream)
        if CUDA:
            torch.cuda.synchronize()
        return y, *gradients

    if provider != "base_only":  # another function
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in operands]
        truth = lora_linear_reference(exact[0], exact[1], exact[2], exact[3], exact[4])
        true_gradients = torch.autograd.grad(truth, [exact[0], exact[2], exact[3]], upstream.double())
        for got, want in zip(step(), (truth, *true_gradients), strict=True):
            assert (got.double() - want).norm() <= (1e-2 if CUDA else 1e-5) * want.norm()
    benchmark(step)
