"""End a command at SIGTERM or SIGINT (Ctrl-C) with one line and an exit code, at any moment and without a traceback."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Programs that start several processes often send a signal twice, and the second must not cut short what the first
# began: the removal of unfinished files. A later one is taken for a new request.
REPEAT_SECONDS = 5.0
# Python runs a handler only once the main thread is back from foreign code, which may wait for minutes: for another
# process, say. A command that has nothing to save does not wait longer than this.
PATIENCE_SECONDS = 5.0

# Exit code of a command whose output nobody reads any more, as in `d2f --help | head`: 128 plus the number of SIGPIPE.
NO_READER_CODE = 141

# Number of the signal whose exception was raised; None for none.
_raised: int | None = None

Result = TypeVar("Result")


class StopRequestedError(KeyboardInterrupt):
    """Stop the command because of a signal. Like KeyboardInterrupt, it passes by every `except Exception`.

    Args:
        number: Number of the signal.
        kept: What is kept, in words; empty where nothing is.

    Attributes:
        exit_code: 128 plus the number of the signal, as a shell gives it: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{'; ' if kept else ''}{kept}")
        self.number, self.exit_code = number, 128 + number


class CommandSignals:
    """Raise StopRequestedError in the main thread when a signal arrives, once for signals that closely follow.

    Attributes:
        exit_code: Exit code of the process once its work is done: from then on a signal ends it at once with this
            code. None as long as it works.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._raised_at = float("-inf")
        self._handled_at = float("-inf")
        self._previous: dict[int, signal._HANDLER] = {}
        self._hook = sys.unraisablehook

    def install(self) -> None:
        """Install the handlers; other threads than the main one may not. Ignored signals, as under nohup, stay so."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self.handle)
        sys.unraisablehook = self._raise_again

    def end_where_main_thread_is_busy(self) -> None:
        """End the process from another thread if the main thread does not come to handle a signal.

        This lasts as long as the process; it takes the wakeup descriptor of Python's signals.
        """
        if not self._previous:
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def remove(self) -> None:
        """Bring back the handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise StopRequestedError; end the process where its work is done."""
        self._handled_at = time.monotonic()
        if self.exit_code is not None:
            os._exit(self.exit_code)
        if time.monotonic() - self._raised_at < REPEAT_SECONDS:
            return
        self._raised_at = time.monotonic()
        global _raised
        _raised = number
        raise StopRequestedError(number)

    def ignore(self) -> None:
        """Ignore further signals until `exit_code` is set: the command ends in a moment."""
        self._raised_at = float("inf")

    def _watch(self, descriptor: int) -> None:
        """Wait for signals on a pipe, and end the process where the main thread does not handle one."""
        while numbers := os.read(descriptor, 1):
            number, arrived_at = numbers[0], time.monotonic()
            time.sleep(PATIENCE_SECONDS)
            if number not in self._previous or self._handled_at > arrived_at - PATIENCE_SECONDS:
                continue  # The handler may even have run before this thread read the number.
            # Other handlers, as those of a run with unsaved steps, take the time that they need.
            if signal.getsignal(number) == self.handle:
                code = 128 + number if self.exit_code is None else self.exit_code
                os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
                os._exit(code)

    def _raise_again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Send the signal again where Python dropped its exception, as it does with those of destructors."""
        error = unraisable.exc_value
        if not isinstance(error, StopRequestedError):
            self._hook(unraisable)
            return
        self._raised_at = float("-inf")
        again = threading.Timer(0.01, os.kill, (os.getpid(), error.number))
        again.daemon = True
        again.start()


def unless_stopped(work: Callable[[], Result]) -> Result:
    """Return the result of a function whose errors are not those of its work once a signal has arrived.

    Libraries in other languages turn the exception of a signal into one of theirs.

    Args:
        work: The function.

    Raises:
        StopRequestedError: The function raised an exception after a signal had arrived.
        Exception: The function raised it.
    """
    try:
        return work()
    except Exception as error:
        if _raised is not None:
            raise StopRequestedError(_raised) from error
        raise


def run_until_stopped(program: str, work: Callable[[], int], *, ends_process: bool) -> int:
    """Do the work of a command, and return its exit code, or that of the signal that stopped it.

    Args:
        program: Name of the command, which begins the line that is printed when a signal stops it.
        work: Function that does the work and returns the exit code.
        ends_process: Whether nothing follows but the end of the process. The handlers then stay, so that a signal
            during Python's own shutdown prints no traceback.
    """
    global _raised
    signals, code, _raised = CommandSignals(), 1, None
    try:
        signals.install()
        if ends_process:
            signals.end_where_main_thread_is_busy()
        code = work()
        signals.ignore()
    except StopRequestedError as stop:
        signals.ignore()
        print(f"{program}: {stop}", file=sys.stderr)
        code = stop.exit_code
    except SystemExit as end:  # The parser of options raises it.
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BrokenPipeError:
        if not ends_process or output_is_read():
            raise
        code = NO_READER_CODE
    finally:
        if ends_process:
            if not output_is_read() and code == 0:
                code = NO_READER_CODE
            signals.exit_code = code
        else:
            signals.remove()
    return code


def output_is_read() -> bool:
    """Write out what was printed, and return whether it has a reader; what none reads is thrown away."""
    is_read = True
    for stream in (sys.stdout, sys.stderr):
        try:
            # A test's replacement has no descriptor, and a stream that was closed before the start is None.
            descriptor = stream.fileno()
        except (AttributeError, OSError):
            continue
        poll = select.poll()
        poll.register(descriptor, 0)
        # A print that failed leaves nothing to write, so that the pipe itself is asked.
        lost = any(event & select.POLLERR for _, event in poll.poll(0))
        try:
            stream.flush()
        except BrokenPipeError:
            lost = True
        if lost:
            is_read = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # Python writes the rest once more when it ends.
    return is_read
