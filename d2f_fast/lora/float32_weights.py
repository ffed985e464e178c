"""Treat a network that holds weights in half precision as one of float32 weights, without a second copy of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def float32_stand_ins(network: nn.Module) -> Iterator[None]:
    """Put float32 tensors that take no memory in place of half-precision weights inside a `with` block.

    peft gives a new adapter the type of the weight that it adapts. Its values would be rounded to half precision.

    Args:
        network: Network, which must not compute inside the block.
    """
    held = [(p, p.data) for p in network.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    for parameter, weight in held:
        parameter.data = torch.empty(1, device=weight.device).expand(weight.shape)
    try:
        yield
    finally:
        for parameter, weight in held:
            parameter.data = weight


@contextmanager
@torch.no_grad()
def computing_in_float32(network: nn.Module) -> Iterator[None]:
    """Let a network compute in float32 inside a `with` block, with the weights of one layer cast at a time.

    Args:
        network: Network without gradients, which is given float32 inputs.
    """
    held: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def cast(module: nn.Module, _: object) -> None:
        parameters = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        held[module] = [(parameter, parameter.data) for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, _: object, __: object) -> None:
        for parameter, weight in held.pop(module, ()):
            parameter.data = weight

    layers = [m for m in network.modules() if any(p.dtype != torch.float32 for p in m.parameters(recurse=False))]
    handles = [layer.register_forward_pre_hook(cast) for layer in layers]
    handles += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
