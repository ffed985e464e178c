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
    """Switch a network's frozen weights between their exact values in float32 and half precision.

    Each half-precision weight keeps its address while it is on one device, so that compiled and captured steps find it
    after a switch. The exact weights wait on the CPU in the type and memory that they came in, such as float16 in a
    mapped file.

    Args:
        network: network whose frozen weights are switched; they stay as they are until `use`. Frozen weights that
            autocast does not cast, those of norms, become float32.
        dtype: half-precision type that autocast rounds to.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        found = {id(p): p for layer in layers for p in (layer.weight, layer.bias) if p is not None}
        self._parameters = [p for p in found.values() if not p.requires_grad and p.is_floating_point()]
        for parameter in network.parameters():
            if id(parameter) not in found and not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        self._dtype, self._is_half = dtype, False
        self._exact: list[Tensor | None] = [None] * len(self._parameters)
        self._half: list[Tensor] | None = None

    def use(self) -> None:
        """Give the network its half-precision weights; the exact ones are kept on the CPU."""
        if self._is_half:
            return
        halves = self._half or [torch.empty_like(parameter, dtype=self._dtype) for parameter in self._parameters]
        for index, (parameter, half) in enumerate(zip(self._parameters, halves, strict=True)):
            exact, kept = parameter.detach(), self._exact[index]
            half.copy_(exact)
            exact = exact.to("cpu")
            # A kept weight may take less memory than the float32 one that was made of it, and serves until it changes.
            if kept is None or not torch.equal(kept.float(), exact):
                self._exact[index] = exact
            parameter.data = half
        self._is_half = True

    def restore(self) -> None:
        """Give the network its exact weights back, in float32."""
        if not self._is_half:
            return
        self._half = [parameter.detach() for parameter in self._parameters]  # The network may have been moved.
        for parameter, exact in zip(self._parameters, self._exact, strict=True):
            assert exact is not None
            if exact.dtype != torch.float32 or exact.device != parameter.device:
                exact = torch.empty_like(parameter, dtype=torch.float32).copy_(exact)
            parameter.data = exact
        self._is_half = False

    @contextmanager
    def in_use(self, *, restore: bool = True) -> Iterator[None]:
        """Return a context that runs its block with half-precision weights, and restores the exact ones.

        Args:
            restore: whether the exact weights are restored; False leaves them on the CPU.
        """
        self.use()
        try:
            yield
        finally:
            if restore:
                self.restore()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Return a context that runs its block with the exact weights."""
        was_half = self._is_half
        self.restore()
        try:
            yield
        finally:
            if was_half:
                self.use()
