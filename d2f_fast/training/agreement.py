"""Let all processes of a run know what one of them has met, before each step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

# Once one process has ended, its launcher ends the others by SIGTERM. A process that loses its connection waits this
# long for the signal, so that a run which was stopped ends as a stopped one in every process, and not as a failure.
LAUNCHER_SECONDS = 5.0


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or cannot be reached; the message says what is saved."""

    exit_code = 1


class Agreement:
    """Exchange small numbers and texts between the hosts of a run, without waiting for a device.

    Every process calls each method at the same point of the run.

    Args:
        device: device of this process. A group of its own connects the hosts where the run's group connects GPUs.
        num_processes: number of processes in the run; with one process nothing is exchanged.
    """

    def __init__(self, device: torch.device, num_processes: int) -> None:
        self.alone = num_processes == 1
        self._group: distributed.ProcessGroup | None = None
        if not self.alone and device.type != "cpu":
            with connecting():
                self._group = distributed.new_group(backend="gloo")

    def largest(self, *values: int) -> list[int]:
        """Return the largest value of all processes, for each of the values.

        Raises:
            LostProcessError: another process has ended.
        """
        if self.alone:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64)
        with _lost_process_reported():
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=self._group)
        return [int(value) for value in largest]

    def texts(self, text: str) -> list[str]:
        """Return the text of each process, in their order.

        Raises:
            LostProcessError: another process has ended.
        """
        if self.alone:
            return [text]
        found: list[str | None] = [None] * distributed.get_world_size(self._group)
        with _lost_process_reported():
            distributed.all_gather_object(found, text, group=self._group)
        return [each or "" for each in found]


def sum_over_processes(values: Tensor) -> None:
    """Replace a tensor by its sum over all processes, in place and in the order of the device's work.

    Raises:
        LostProcessError: another process has ended. On a GPU, where nothing waits for the sum here, it shows later.
    """
    with _lost_process_reported():
        distributed.all_reduce(values)


@contextmanager
def connecting() -> Iterator[None]:
    """Turn the errors of processes that connect into LostProcessError, unless the launcher's signal comes first."""
    try:
        yield
    except RuntimeError as error:  # The types of torch's own are below it.
        time.sleep(LAUNCHER_SECONDS)  # A signal ends the command here.
        reason = str(error).strip().partition("\n")[0]
        raise LostProcessError(
            f"the processes of this run cannot connect ({reason}): another one has ended, or MASTER_ADDR and"
            " MASTER_PORT do not lead to the first one"
        ) from error


@contextmanager
def _lost_process_reported() -> Iterator[None]:
    """Turn the errors of a lost connection into LostProcessError."""
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for the errors of gloo.
        raise LostProcessError("another process of this run has ended") from error
