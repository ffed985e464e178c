"""A signal stops a run after the step in progress, with a checkpoint."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.training.signals import InterruptedRunError


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
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT after step 3: saved"):
        trainer.fit(images(change=interrupt))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in tmp_path.glob("run/*checkpoint*")] == ["checkpoint-3"]
    trainer.fit(images())
    straight = make_trainer("straight", dataloader_num_workers=0)
    straight.fit(images())
    assert_equal(state_of(trainer), state_of(straight))
