"""Capture a training step as CUDA graphs, one for each shape of its inputs, and replay them.

    new shape      copy the inputs to fixed addresses, run three warm-up steps on a side stream, capture
    known shape    copy the inputs to these addresses, replay

A captured step has to find everything else at a fixed address too, and change it in place. The recipe is NVIDIA's:
docs.nvidia.com/dl-cuda-graph.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_GRAPHS = 4  # each graph keeps its own inputs; a run of many shapes would fill the memory
WARM_UP_STEPS = 3

Inputs = TypeVar("Inputs", bound=NamedTuple)


class _Captured(NamedTuple, Generic[Inputs]):
    """One captured step: its graph, the inputs that it reads, and the loss that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    loss: Tensor


class StepGraphs(Generic[Inputs]):
    """Replay a step from the graph of its shape.

    Args:
        run: take the step on inputs whose tensors stay where they are, and return its loss, without waiting for the
            device.
        warm_up: run the step on such inputs to no effect.
    """

    def __init__(self, run: Callable[[Inputs], Tensor], warm_up: Callable[[Inputs], None]) -> None:
        self._run, self._warm_up = run, warm_up
        self._captured: dict[Hashable, _Captured[Inputs]] = {}
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._warned = False

    def __call__(self, inputs: Inputs) -> Tensor:
        """Take the step captured, or uncaptured for a shape beyond the first four.

        Args:
            inputs: named tuple of tensors, dictionaries of tensors, and constants.

        Returns:
            The loss of the step.
        """
        key = _key(inputs)
        if key not in self._captured:
            if len(self._captured) == MAX_GRAPHS:
                if not self._warned:
                    logger.warning("more than %d shapes: steps of further shapes run uncaptured", MAX_GRAPHS)
                self._warned = True
                return self._run(inputs)
            self._captured[key] = self._capture(inputs)
        captured = self._captured[key]
        torch._foreach_copy_(_tensors(captured.inputs), _tensors(inputs))
        captured.graph.replay()
        return captured.loss.clone()  # the next replay writes to the same address

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Forget the graphs, when tensors that they read were replaced."""
        self._captured.clear()
        self._pool = None

    def _capture(self, inputs: Inputs) -> _Captured[Inputs]:
        """Warm up on copies of the inputs, and capture the step that reads these copies."""
        static = _copied(inputs)
        new_stream: Callable[[], torch.cuda.Stream] = torch.cuda.Stream  # torch declares no types for the call itself
        side = new_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._warm_up(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            # One pool serves all graphs: they never run at once, and a graph needs its memory no longer than until its
            # loss is copied.
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: other threads, which load data and pin memory, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._run(static)
        return _Captured(graph, static, loss)


def _tensors(inputs: NamedTuple) -> list[Tensor]:
    """Return the tensors in a named tuple, in order."""
    found: list[Tensor] = []
    for value in inputs:
        found += value.values() if isinstance(value, dict) else [value] if isinstance(value, Tensor) else []
    return found


def _copied(inputs: Inputs) -> Inputs:
    """Return the same named tuple with copies of its tensors."""

    def copied(value: object) -> object:
        if isinstance(value, dict):
            return {name: tensor.clone() for name, tensor in value.items()}
        return value.clone() if isinstance(value, Tensor) else value

    return inputs._make(map(copied, inputs))


def _key(inputs: NamedTuple) -> Hashable:
    """Return what a graph is fixed to: names, shapes and types of the tensors, and the constants."""

    def of(value: object) -> Hashable:
        if isinstance(value, dict):
            return tuple((name, of(tensor)) for name, tensor in value.items())
        return (value.shape, value.dtype) if isinstance(value, Tensor) else value

    return tuple(map(of, inputs))
