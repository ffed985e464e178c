"""Stop a run where its state can be saved when SIGTERM or SIGINT arrives."""

import signal
from types import FrameType, TracebackType

import torch


class InterruptedRunError(RuntimeError):
    """A run stopped because of SIGTERM or SIGINT, after a checkpoint was saved."""

    exit_code = 143


class StopSignals:
    """Note SIGTERM and SIGINT inside a `with` block, in place of ending the process.

    A second signal ends the process at once. The handlers from before return at the end of the block. Outside the main
    thread, where Python allows no handlers, signals keep their effect.

    Attributes:
        received: number of the signal that arrived; None for none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # this is not the main thread
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device, num_processes: int) -> int | None:
        """Return the number of the signal that any process received, None for none; all processes call it together.

        A process that stopped alone would leave the others waiting in the gradient sum of their next step.

        Args:
            device: device of this process.
            num_processes: number of processes in the run.
        """
        if num_processes == 1:
            return self.received
        received = torch.tensor(self.received or 0, device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, and let a second one end the process."""
        self.received = number
        signal.signal(number, signal.SIG_DFL)
