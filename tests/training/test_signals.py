"""A signal stops a run after the step in progress, with a checkpoint."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.stopping import run_until_stopped
from d2f_fast.training.signals import InterruptedRunError, stop_signals


def test_interrupted_run_is_saved_and_the_trainer_can_continue(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    sent = []

    def interrupt(index: int, item: dict[str, Any]) -> dict[str, Any]:
        if trainer.global_step == 2 and not sent:
            sent.append(index)
            os.kill(os.getpid(), signal.SIGINT)
        return item

    # Without threads that read ahead, the images of step 3 are read when two steps are taken.
    trainer = make_trainer(checkpointing_steps=0, dataloader_num_workers=0)
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT after step 2: saved"):
        trainer.fit(images(change=interrupt))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in tmp_path.glob("run/*checkpoint*")] == ["checkpoint-2"]
    trainer.fit(images())
    straight = make_trainer("straight", dataloader_num_workers=0)
    straight.fit(images())
    assert_equal(state_of(trainer), state_of(straight))


def test_signal_is_announced_at_once_and_repetitions_change_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_signals(lambda: True) as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert capfd.readouterr().err.strip() == "d2f: SIGINT: saving after this step"
        with stop_signals(lambda: False) as inner:
            assert inner is signals
        assert signals.received == signal.SIGINT


@pytest.mark.parametrize("unsaved", [True, False])
def test_command_with_nothing_to_save_ends_at_once(unsaved: bool) -> None:
    def work() -> int:
        with stop_signals(lambda: unsaved) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
        return signals.received or 0

    assert run_until_stopped("d2f", work, ends_process=False) == (signal.SIGTERM if unsaved else 143)


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals(lambda: True) as signals:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)
