"""Stop all processes of a run after the same step, with that step saved, for whatever reason one of them has."""

import signal
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.training.agreement import LAUNCHER_SECONDS, Agreement, LostProcessError
from d2f_fast.training.signals import InterruptedRunError, StopSignals


class Stop:
    """Decide before each step whether the run goes on.

    Args:
        agreement: connection to the other processes.
        signals: signals that this process has received.
        save: function that saves the run if it has unsaved steps, and returns why it could not; "" where it is saved.
        writes: whether this is the process that writes the files.
    """

    def __init__(self, agreement: Agreement, signals: StopSignals, save: Callable[[], str], writes: bool) -> None:
        self._agreement, self._signals, self._save, self._writes = agreement, signals, save, writes

    def where_agreed(self, failure: Exception | None, steps_taken: int) -> None:
        """Save and stop the run if any process has failed or has received a signal; all processes call it together.

        Args:
            failure: reason why this process cannot go on; None where it can.
            steps_taken: number of steps taken.

        Raises:
            InterruptedRunError: a process has received a signal.
            LostProcessError: a process has ended without a word.
            RefusedInputError: a process cannot go on; the message is that of its refusal.
            Exception: this process has failed with this exception, which is not a refusal.
        """
        try:
            number, failed = self._agreement.largest(self._signals.received or 0, int(failure is not None))
            if failed:
                texts = self._agreement.texts("" if failure is None else str(failure) or type(failure).__name__)
        except LostProcessError as error:
            self._stop_alone(error, steps_taken)
        if failed:
            self._stop_failed(failure, texts, steps_taken)
        if number:
            raise self._interrupted(number, steps_taken, self._agreed_problem())

    def where_a_step_fails(self, step: Callable[[], Tensor], steps_taken: int, is_whole: Callable[[], bool]) -> Tensor:
        """Return the result of a step; where it fails, as for lack of memory, save the steps before it.

        Args:
            step: function that takes the step.
            steps_taken: number of steps taken before.
            is_whole: function that returns whether a failed step has left the weights as they were before.

        Raises:
            InterruptedRunError: this process has received a signal, and the other one has ended already.
            LostProcessError: another process has ended.
            Exception: the step failed with this exception, whose note says whether the steps before are saved.
        """
        try:
            return step()
        except LostProcessError as error:
            return self._stop_alone(error, steps_taken)
        except Exception as error:
            if steps_taken and self._writes and is_whole():
                with suppress(Exception):  # After some errors a GPU computes nothing any more.
                    problem = self._save()
                    error.add_note(f"d2f: step {steps_taken} is {f'not saved ({problem})' if problem else 'saved'}")
            raise

    def _stop_failed(self, failure: Exception | None, texts: list[str], steps_taken: int) -> None:
        """Save the run, and raise the failure, or the refusal of the first process that failed."""
        problem = self._agreed_problem()
        saved = f"step {steps_taken} is {'not saved' if problem else 'saved'}"
        if problem and problem not in texts:
            saved += f" ({problem})"
        ending = f"; {saved}" if steps_taken else ""
        if failure is None:
            first = next(process for process, text in enumerate(texts) if text)
            raise RefusedInputError(f"process {first}: {texts[first]}{ending}")
        if isinstance(failure, RefusedInputError):
            raise type(failure)(f"{failure}{ending}") from failure
        failure.add_note(f"d2f: {saved}")
        raise failure

    def _stop_alone(self, error: LostProcessError, steps_taken: int) -> Tensor:
        """Save the run without the other processes, and raise; it never returns.

        The other process may have ended at a signal, which then comes to this one, too.
        """
        problem = self._save() if self._writes else "only the first process writes files"
        self._signals.wait(LAUNCHER_SECONDS)
        if self._signals.received is not None:
            raise self._interrupted(self._signals.received, steps_taken, problem) from error
        if steps_taken == 0:
            raise LostProcessError(f"{error}, before the first step") from error
        saved = f"not saved ({problem})" if problem else "saved"
        raise LostProcessError(f"{error}; step {steps_taken} is {saved}") from error

    def _interrupted(self, number: int, steps_taken: int, problem: str) -> InterruptedRunError:
        """Return the error of a run that a signal stopped."""
        name = signal.Signals(number).name
        if steps_taken == 0:
            return InterruptedRunError(f"stopped by {name} before the first step", number)
        goes_on = f"saved as checkpoint-{steps_taken}, which --resume_from_checkpoint latest continues"
        saved = f"not saved ({problem})" if problem else goes_on
        return InterruptedRunError(f"stopped by {name} after step {steps_taken}: {saved}", number)

    def _agreed_problem(self) -> str:
        """Save the run, wait until every process has, and return why the first that could not; "" where it is saved."""
        problem = self._save()
        try:
            return next(filter(None, self._agreement.texts(problem)), "")
        except LostProcessError:  # The others have stopped already; this process knows of its own part.
            return problem
