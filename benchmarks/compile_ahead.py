"""Compile the LoRA kernels that a tuning is about to launch, in other processes, into Triton's cache on disk.

The processes call the same launch functions on tensors without memory, and Triton compiles instead of launching. The
key of the cache is made of types, alignments, constants and options, which are therefore those of the launch. The
processes never use the GPU; they are given its target.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from benchmarks.lora_paths import Operands, operands
from d2f_fast.kernels import lora_kernels
from d2f_fast.kernels.lora_dispatch import MIN_ROWS, Entry, NarrowEntry, Tile

MOST_PROCESSES = 14  # each imports torch, which takes a gigabyte; a container may report its host's cores
KERNELS = ("_narrow_kernel", "_wide_kernel", "_grad_b_kernel", "_rows_sum_kernel")


class Launch(NamedTuple):
    """A launch of one kernel; of the number of rows, only whether it is a multiple of 16 changes the compiled code.

    Args:
        call: key of CALLS.
        tile: block sizes.
        n: output features.
        k: input features.
        rank: rank of the adapter.
    """

    call: str
    tile: Tile
    n: int
    k: int
    rank: int


CALLS: dict[str, Callable[[Operands, Tile], Any]] = {
    "s": lambda o, tile: lora_kernels.launch_shrink(o.x, o.a, tile),
    "y": lambda o, tile: lora_kernels.launch_forward(o.x, o.weight, o.bias, o.s, o.b, tile),
    "grad_s": lambda o, tile: lora_kernels._launch_narrow(o.grad_y, o.b, o.b.shape[1], (1, o.b.shape[1]), tile),
    "grad_b": lambda o, tile: lora_kernels._launch_rows_sum(o.grad_y, o.s, tile),
    "grad_s and grad_b": lambda o, tile: lora_kernels.launch_backward_ds_db(o.grad_y, o.s, o.b, tile, one_pass=True),
    "grad_a": lambda o, tile: lora_kernels.launch_backward_da(o.grad_s, o.x, tile),
    "grad_x": lambda o, tile: lora_kernels.launch_backward_dx(o.grad_y, o.weight, o.grad_s, o.a, tile),
}


def narrow_launches(entry: NarrowEntry, n: int, k: int, rank: int) -> list[Launch]:
    """Return the launches of a layer other than its wide products."""
    calls = [("s", entry.shrink), ("grad_a", entry.rows_sum)]
    if entry.grad_b is not None:
        calls += [("grad_s and grad_b", entry.grad_b)]
    else:
        calls += [("grad_s", entry.shrink), ("grad_b", entry.rows_sum)]
    return [Launch(call, tile, n, k, rank) for call, tile in calls]


def wide_launches(entry: Entry, n: int, k: int, rank: int) -> list[Launch]:
    """Return the launches of a layer's wide products."""
    return [Launch("y", entry.forward, n, k, rank), Launch("grad_x", entry.grad_x, n, k, rank)]


def free_cores() -> int:
    """Return a number of processes that leaves one core to the tuning and one to everything else."""
    return max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 2))


class Ahead:
    """Compile launches in other processes.

    Args:
        processes: number of processes; with 0, every kernel is compiled by its launch, in this process.
        target: Triton's target of the GPU that will launch.
        dtype: type of the products.

    Attributes:
        missed: number of kernels that were compiled in this process, at their launch.
    """

    def __init__(self, processes: int, target: Any = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self._dtype, self._pool, self.missed = dtype, None, 0
        self._compiling: dict[Launch, Future[None]] = {}
        if processes:
            import triton  # imported here, because a machine without it compiles nothing

            triton.knobs.compilation.listener = self._count
            spawn = multiprocessing.get_context("spawn")  # a forked process would inherit the CUDA context
            self._pool = ProcessPoolExecutor(processes, spawn, compile_only, (target,))

    def submit(self, launches: Iterable[Launch]) -> None:
        """Start compiling these launches, in this order."""
        for launch in dict.fromkeys(launches):
            if self._pool is not None and launch not in self._compiling:
                try:
                    self._compiling[launch] = self._pool.submit(compile_launch, launch, self._dtype)
                except RuntimeError as error:  # the processes have ended
                    self._give_up(error)

    def wait(self, launches: Iterable[Launch]) -> None:
        """Wait until these launches are compiled."""
        launches = list(launches)
        self.submit(launches)
        for launch in launches:
            if self._pool is not None:
                try:
                    self._compiling[launch].result()
                except Exception as error:  # the launch compiles the kernel again and raises what is wrong
                    self._give_up(error)

    def close(self) -> None:
        """End the processes, and print what they did."""
        if self._pool is not None:
            done = sum(future.done() for future in self._compiling.values())
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            print(f"{done} launches compiled ahead, {self.missed} kernels where they were launched")

    def _give_up(self, error: Exception) -> None:
        print(f"compiling ahead failed, kernels compile where they are launched: {type(error).__name__}: {error}")
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _count(self, *, cache_hit: bool, **_: Any) -> None:
        self.missed += not cache_hit


class _FixedDriver:
    """Driver that answers the questions that Triton asks before a launch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _CompileOnly:
    """Kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._kernel.run(*args, grid=grid, warmup=True, **kwargs)


def compile_only(target: Any) -> None:
    """Make this process compile kernels for a target instead of launching them, from now on."""
    from triton.runtime import driver

    driver.set_active(_FixedDriver(target))
    for name in KERNELS:
        setattr(lora_kernels, name, _CompileOnly(getattr(lora_kernels, name)))


def compile_launch(launch: Launch, dtype: torch.dtype) -> None:
    """Compile the kernel of a launch, in a process after `compile_only`."""
    given = operands(MIN_ROWS, launch.n, launch.k, launch.rank, torch.device("meta"), dtype)
    CALLS[launch.call](given, launch.tile)
