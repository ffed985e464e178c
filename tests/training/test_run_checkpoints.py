"""Runs that diverge: what is saved, what is kept, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast.errors import CheckpointError
from d2f_fast.training.trainer import AlignedTrainer, NonFiniteRunError


def checkpoints(trainer: AlignedTrainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.config.output_dir).glob("*checkpoint*"))


@pytest.mark.parametrize("limit", [1, 2])
def test_skipped_steps_are_not_saved_and_evict_no_checkpoint(
    images: Any, make_non_finite: Any, make_trainer: Any, limit: int
) -> None:
    options = {"max_train_steps": 20, "checkpointing_steps": 2, "checkpoints_total_limit": limit}
    trainer = make_trainer(cache_latents=False, **options)
    make_non_finite(trainer, 5, 20)
    with pytest.raises(NonFiniteRunError, match="not finite in 10 steps in a row, the last at step 14"):
        trainer.fit(images())
    # No finite step followed that of step 4, so that the one before it stays whatever the limit is.
    assert checkpoints(trainer) == ["checkpoint-2", "checkpoint-4"]


def test_older_checkpoint_goes_once_a_finite_step_followed_the_newest(images: Any, make_trainer: Any) -> None:
    trainer = make_trainer(max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=1, logging_steps=1)
    seen, step = {}, trainer.step

    def noting(batch: Any) -> Tensor:
        seen[trainer.global_step] = checkpoints(trainer)
        return step(batch)

    trainer.step = noting  # type: ignore[method-assign]
    trainer.fit(images())
    assert seen[4] == ["checkpoint-2", "checkpoint-4"]
    assert checkpoints(trainer) == ["checkpoint-4", "checkpoint-5"]  # no step follows the last one


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("logging_steps", [1, 7], ids=["found at the log", "found at the checkpoint"])
def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(
    images: Any, make_trainer: Any, value: float, logging_steps: int
) -> None:
    trainer = make_trainer(checkpointing_steps=2, checkpoints_total_limit=1, logging_steps=logging_steps)
    step = trainer.step

    def diverging(batch: Any) -> Tensor:
        loss = step(batch)
        if trainer.global_step == 4:
            next(iter(trainer.trainable.values())).data[0, 0] = value  # an update that overflows
        return loss

    trainer.step = diverging  # type: ignore[method-assign]
    with pytest.raises(NonFiniteRunError, match="the weights are not finite after step 4, which is not saved: lower"):
        trainer.fit(images())
    assert checkpoints(trainer) == ["checkpoint-2"]


def test_pipeline_with_weights_that_are_not_finite_is_not_saved(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(adapter="full", ema_decay=0.0)
    with torch.no_grad():
        trainer.unet.conv_in.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"conv_in\.weight holds NaN or infinity and is not written"):
        trainer.save_pipeline(tmp_path / "pipeline")
    assert list(tmp_path.glob("*pipeline*")) == []
