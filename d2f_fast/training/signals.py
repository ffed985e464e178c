"""Stop a run where its state can be saved when SIGTERM or SIGINT arrives."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from d2f_fast.stopping import STOP_SIGNALS, CommandSignals


class InterruptedRunError(RuntimeError):
    """A run stopped because of SIGTERM or SIGINT; the message says what is saved.

    Args:
        message: What happened, in one line.
        number: Number of the signal.

    Attributes:
        exit_code: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


class StopSignals:
    """Note SIGTERM and SIGINT, in place of ending the process, as long as a run has something to save.

    Repeated signals change nothing: programs that start several processes send them, and the run is being saved.

    Args:
        unsaved: Function that returns whether the run has something to save. A command, which ends at a signal, ends
            at once where it returns False. Called from Python, a signal is always noted.
        announce: Say at once, on standard error, that the run is saved after the step in progress.

    Attributes:
        received: Number of the first signal that arrived; None for none.
    """

    def __init__(self, unsaved: Callable[[], bool] = lambda: True, *, announce: bool = True) -> None:
        self.received: int | None = None
        self._unsaved, self._announce = unsaved, announce
        self._previous: dict[int, signal._HANDLER] = {}

    def install(self) -> None:
        """Install the handlers.

        Signals that are ignored, as under nohup, stay ignored. Outside the main thread, where Python allows no
        handlers, signals keep their effect.
        """
        with contextlib.suppress(ValueError):  # This is not the main thread.
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Bring back the handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Wait until a signal arrives, or at most so many seconds."""
        end = time.monotonic() + seconds
        while self.received is None and time.monotonic() < end:
            time.sleep(0.05)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, or end the command where it has nothing to save."""
        if self.received is not None:
            return
        previous = self._previous[number]
        command = getattr(previous, "__self__", None)
        if isinstance(command, CommandSignals) and not self._unsaved():
            command.handle(number, frame)
            return
        self.received = number
        if self._announce:
            # Not print, which may be in the middle of another line of this thread, and then raises an exception.
            with contextlib.suppress(OSError):
                os.write(2, f"\nd2f: {signal.Signals(number).name}: saving after this step\n".encode())


_active: list[StopSignals] = []


@contextmanager
def stop_signals(unsaved: Callable[[], bool], *, announce: bool = True) -> Iterator[StopSignals]:
    """Note signals inside a `with` block; a block inside another one shares its signals.

    Args:
        unsaved: Function that returns whether the run has something to save; see `StopSignals`.
        announce: Say at once, on standard error, that the run is saved after the step in progress.
    """
    if _active:
        yield _active[-1]
        return
    signals = StopSignals(unsaved, announce=announce)
    _active.append(signals)
    try:
        signals.install()
        yield signals
    finally:
        signals.remove()
        _active.remove(signals)
