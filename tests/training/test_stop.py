"""Reasons for which one process stops all processes of a run, and what their messages say about the last step."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from d2f_fast.errors import DatasetError, RefusedInputError
from d2f_fast.training import stop as stop_module
from d2f_fast.training.agreement import Agreement, LostProcessError
from d2f_fast.training.signals import InterruptedRunError, StopSignals
from d2f_fast.training.stop import Stop

GOES_ON = "as checkpoint-3, which --resume_from_checkpoint latest continues"


class Other(Agreement):
    """Connection to one other process, which gives these values and texts."""

    def __init__(self, values: tuple[int, int] = (0, 0), texts: tuple[str, ...] = (), lost: bool = False) -> None:
        super().__init__(torch.device("cpu"), 1)
        self.values, self.given, self.lost = values, list(texts), lost

    def largest(self, *values: int) -> list[int]:
        if self.lost:
            raise LostProcessError("another process of this run has ended")
        return [max(pair) for pair in zip(values, self.values, strict=True)]

    def texts(self, text: str) -> list[str]:
        return [text, self.given.pop(0)]


def make_stop(
    agreement: Agreement, received: int | None = None, save: Callable[[], str] = lambda: "", writes: bool = True
) -> Stop:
    signals = StopSignals()
    signals.received = received
    return Stop(agreement, signals, save, writes)


def test_run_goes_on_where_no_process_has_a_reason() -> None:
    make_stop(Other(), save=lambda: pytest.fail("nothing is to be saved")).where_agreed(None, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("own", [True, False], ids=["own signal", "signal of the other"])
def test_signal_of_one_process_stops_both(number: int, code: int, own: bool) -> None:
    agreement = Other((0 if own else number, 0), ("",))
    with pytest.raises(InterruptedRunError) as caught:
        make_stop(agreement, number if own else None).where_agreed(None, 3)
    assert str(caught.value) == f"stopped by {signal.Signals(number).name} after step 3: saved {GOES_ON}"
    assert caught.value.exit_code == code


def test_message_does_not_say_saved_where_the_first_process_could_not_save() -> None:
    other = Other(texts=("the disk is full",))
    with pytest.raises(InterruptedRunError, match=r"after step 3: not saved \(the disk is full\)$"):
        make_stop(other, signal.SIGTERM).where_agreed(None, 3)
    with pytest.raises(InterruptedRunError, match=r"^stopped by SIGTERM before the first step$"):
        make_stop(Other(texts=("",)), signal.SIGTERM).where_agreed(None, 0)


def test_sample_that_one_process_cannot_read_is_named_by_both() -> None:
    with pytest.raises(DatasetError, match=r"^a\.png does not decode; step 4 is saved$"):
        make_stop(Other(texts=("", ""))).where_agreed(DatasetError("a.png does not decode"), 4)
    with pytest.raises(RefusedInputError, match=r"^process 1: a\.png does not decode; step 4 is saved$"):
        make_stop(Other((0, 1), ("a.png does not decode", ""))).where_agreed(None, 4)
    with pytest.raises(RefusedInputError, match=r"^a\.png does not decode$"):
        make_stop(Other(texts=("", ""))).where_agreed(DatasetError("a.png does not decode"), 0)


def test_failure_to_save_is_said_once() -> None:
    full = RefusedInputError("the disk is full")
    with pytest.raises(RefusedInputError, match=r"^the disk is full; step 4 is not saved$"):
        make_stop(Other(texts=("", "")), save=lambda: "the disk is full").where_agreed(full, 4)


def test_defect_is_raised_as_it_is_with_a_note() -> None:
    with pytest.raises(KeyError) as caught:
        make_stop(Other(texts=("", ""))).where_agreed(KeyError("a"), 4)
    assert caught.value.__notes__ == ["d2f: step 4 is saved"]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "LAUNCHER_SECONDS", 0.0)


def test_process_whose_partner_was_stopped_waits_for_its_own_signal() -> None:
    saved: list[str] = []

    def save() -> str:
        saved.append("step 4")
        return ""

    signals = StopSignals()
    stop = Stop(Other(lost=True), signals, save, writes=True)
    threading.Timer(0.1, setattr, (signals, "received", signal.SIGTERM)).start()
    with pytest.raises(InterruptedRunError, match=r"^stopped by SIGTERM after step 4: saved as") as caught:
        stop.where_agreed(None, 4)
    assert (caught.value.exit_code, saved) == (143, ["step 4"])


@pytest.mark.usefixtures("no_launcher")
def test_process_left_alone_before_the_first_step_speaks_of_no_saved_step() -> None:
    sentence = r"^another process of this run has ended, before the first step$"
    for writes in (True, False):
        with pytest.raises(LostProcessError, match=sentence):
            make_stop(Other(lost=True), writes=writes).where_agreed(None, 0)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    ("received", "writes", "error", "sentence"),
    [
        (None, True, LostProcessError, r"^another process of this run has ended; step 4 is saved$"),
        (None, False, LostProcessError, r"step 4 is not saved \(only the first process writes files\)$"),
        (
            signal.SIGTERM,
            True,
            InterruptedRunError,
            r"^stopped by SIGTERM after step 4: saved as checkpoint-4, which",
        ),
    ],
)
def test_process_left_alone_saves_what_it_can(received: int | None, writes: bool, error: Any, sentence: str) -> None:
    def lose() -> torch.Tensor:
        raise LostProcessError("another process of this run has ended")

    stop = make_stop(Other(lost=True), received, writes=writes)
    with pytest.raises(error, match=sentence):
        stop.where_agreed(None, 4)
    with pytest.raises(error, match=sentence):
        stop.where_a_step_fails(lose, 4, lambda: True)
