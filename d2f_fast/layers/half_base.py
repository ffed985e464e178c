"""Frozen weights in the half-precision type that autocast rounds them to: rounded once, and not at each use.

Autocast caches the casts of trainable weights during a forward, but casts frozen weights again at every use. Only the
weights that autocast casts, those of linear and convolution layers, are cast here, so the products stay the same bit
for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HalfBase:
    """Switch a network's frozen weights between their exact float32 values and half precision.

    Each half-precision weight keeps its address, so that compiled and captured steps find it after a switch.

    Args:
        network: network whose frozen float32 weights are switched; they stay exact until `use`.
        dtype: half-precision type that autocast rounds to.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        found = {id(p): p for layer in layers for p in (layer.weight, layer.bias) if p is not None}
        self._parameters = [p for p in found.values() if not p.requires_grad and p.dtype == torch.float32]
        self._half = [torch.empty_like(parameter, dtype=dtype) for parameter in self._parameters]
        self._exact: list[Tensor] | None = None

    def use(self) -> None:
        """Give the network its half-precision weights; the exact ones are kept on the CPU."""
        if self._exact is not None:
            return
        for half, parameter in zip(self._half, self._parameters, strict=True):
            half.copy_(parameter.detach())
        self._exact = [parameter.detach().to("cpu") for parameter in self._parameters]
        self._hold(self._half)

    def restore(self) -> None:
        """Give the network its exact weights back."""
        if self._exact is not None:
            self._hold([exact.to(half.device) for exact, half in zip(self._exact, self._half, strict=True)])
            self._exact = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Return a context that runs its block with half-precision weights, and restores the exact ones."""
        self.use()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Return a context that runs its block with the exact weights."""
        was_half = self._exact is not None
        self.restore()
        try:
            yield
        finally:
            if was_half:
                self.use()

    def _hold(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight
