"""The log of a run: its rows and rates, rows of a killed run, and accelerate's trackers."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor

from d2f_fast.config import Tracker
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training import run_log
from d2f_fast.training.trainer import AlignedTrainer


def test_resumed_run_drops_damaged_and_later_rows(images: Any, make_trainer: Any) -> None:
    trainer = make_trainer(max_train_steps=1)
    trainer.fit(images())
    log = Path(trainer.config.output_dir, "log.jsonl")
    row = log.read_bytes()
    log.write_bytes(row + b'\xff\xfe\n{"a": 1}\n[1]\n' + row.replace(b'"step": 1', b'"step": 2'))
    make_trainer(max_train_steps=1, resume_from_checkpoint="latest").fit(images())
    assert log.read_bytes() == row


def test_new_run_drops_the_rows_of_an_earlier_run(images: Any, logged_losses: Any, make_trainer: Any) -> None:
    first = make_trainer(max_train_steps=2, checkpointing_steps=0)
    first.fit(images())
    rows = Path(first.config.output_dir, "log.jsonl").read_text()
    second = make_trainer(max_train_steps=2, checkpointing_steps=0, seed=5)
    second.fit(images())
    assert len(logged_losses(second)) == 2 and Path(second.config.output_dir, "log.jsonl").read_text() != rows


def test_log_that_cannot_be_written_does_not_stop_the_run(
    images: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, opened = make_trainer(max_train_steps=2), Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "log.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    assert trainer.fit(images())["steps"] == 2
    assert "log.jsonl: step 1 is not logged (No space left on device)" in caplog.text


def test_last_step_is_logged_and_rates_count_every_image(
    images: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(train_batch_size=2, gradient_accumulation_steps=2, logging_steps=3, checkpointing_steps=0)
    step, now = trainer.step, 0.0

    def slow(batch: Any) -> Tensor:
        nonlocal now
        now += 0.5
        return step(batch)

    trainer.step = slow  # type: ignore[method-assign]
    monkeypatch.setattr("d2f_fast.training.run_log.time", SimpleNamespace(monotonic=lambda: now))
    assert trainer.fit(images())["seconds"] == 3.5
    rows = [json.loads(line) for line in (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()]
    # Ten images are batches of 4, 4 and 2.
    assert [(row["step"], row["images_per_second"]) for row in rows] == [(3, 10 / 1.5), (6, 10 / 1.5), (7, 4 / 0.5)]


def test_tensorboard_shows_the_rows_of_the_log(
    images: Any, logged_losses: Any, make_trainer: Any, tmp_path: Path
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(report_to="tensorboard", max_train_steps=3)
    trainer.fit(images())
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "logs" / "d2f_fast"))
    events.Reload()
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == [1, 2, 3]
    assert [event.value for event in shown] == pytest.approx(logged_losses(trainer), rel=1e-6)
    assert {"lr", "images_per_second"} <= set(events.Tags()["scalars"])


def test_every_tracker_of_accelerate_is_an_option() -> None:
    assert set(get_args(Tracker)) - {"none"} == set(LOGGER_TYPE_TO_CLASS)


def test_missing_tracker_is_refused_before_the_model_is_loaded(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(BaseModel, "load", lambda model: pytest.fail("the model was loaded"))
    sentence = r"^report_to is wandb, which is not installed: pip install wandb, or set report_to to none$"
    with pytest.raises(RefusedInputError, match=sentence):
        AlignedTrainer.from_pretrained("a/model", make_config(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_refused(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedInputError, match=r"^report_to must be none, tensorboard, .* or trackio, got paper$"):
        make_config(tmp_path, report_to="paper")
