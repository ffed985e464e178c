"""Capture a training step as CUDA graphs, one for each shape of its inputs, and replay them.

    new shape      copies of the inputs at fixed addresses, three warm-up steps on a side stream, capture
    known shape    copy the inputs there, replay

A step that is captured has to find everything else at a fixed address too, and change it in place. NVIDIA's recipe:
docs.nvidia.com/dl-cuda-graph.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_GRAPHS = 4  # each keeps its own kernels and inputs; a run of many shapes would fill the memory
WARM_UP_STEPS = 3


class _Captured(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    inputs: Any
    loss: Tensor


class StepGraphs:
    """Replay a step from the graph of its shape.

    Args:
        run: takes the step, for inputs whose tensors stay where they are; returns its loss. No host sync.
        warm_up: runs it on such inputs to no effect.
    """

    def __init__(self, run: Callable[[Any], Tensor], warm_up: Callable[[Any], None]) -> None:
        self._run, self._warm_up = run, warm_up
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None
        self._told = False

    def __call__(self, inputs: Any) -> Tensor:
        """Take the step, captured; a shape beyond the first four uncaptured.

        Args:
            inputs: a named tuple of tensors, dictionaries of tensors, and constants.
        """
        key = _key(inputs)
        if key not in self._captured:
            if len(self._captured) == MAX_GRAPHS:
                if not self._told:
                    logger.warning("more than %d shapes: steps of further shapes run uncaptured", MAX_GRAPHS)
                self._told = True
                return self._run(inputs)
            self._captured[key] = self._capture(inputs)
        captured = self._captured[key]
        torch._foreach_copy_(_tensors(captured.inputs), _tensors(inputs))
        captured.graph.replay()
        return captured.loss.clone()  # the next replay writes there

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Forget the graphs, when tensors that they read were replaced."""
        self._captured.clear()
        self._pool = None

    def _capture(self, inputs: Any) -> _Captured:
        static = _copied(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._warm_up(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            # One for all: they never run at once, and each is done with its memory when its loss has been copied.
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: other threads, that load data and pin memory, go on with theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._run(static)
        return _Captured(graph, static, loss)


def _tensors(inputs: Any) -> list[Tensor]:
    """The tensors in a named tuple, in order."""
    found: list[Tensor] = []
    for value in inputs:
        found += value.values() if isinstance(value, dict) else [value] if isinstance(value, Tensor) else []
    return found


def _copied(inputs: Any) -> Any:
    """The same named tuple with its own tensors."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tensor.clone() for name, tensor in value.items()}
        return value.clone() if isinstance(value, Tensor) else value

    return type(inputs)(*map(copied, inputs))


def _key(inputs: Any) -> Any:
    """What a graph is fixed to: names, shapes and types of the tensors, and the constants."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return tuple((name, of(tensor)) for name, tensor in value.items())
        return (value.shape, value.dtype) if isinstance(value, Tensor) else value

    return tuple(map(of, inputs))
