"""Log a run: a progress bar, a line of JSON for each logged step, and one of accelerate's trackers if asked for."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm import tqdm

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.atomic import atomic_path, make_folder
from d2f_fast.files.json_file import write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

PROJECT = "d2f_fast"


def check_tracker(report_to: str) -> None:
    """Refuse a tracker that is not installed.

    Args:
        report_to: accelerate's name of a tracker, or "none".

    Raises:
        RefusedInputError: the tracker's package is missing.
    """
    if report_to != "none" and report_to not in map(str, get_available_trackers()):
        raise RefusedInputError(
            f"report_to is {report_to}, which is not installed: pip install {report_to}, or set report_to to none"
        )


def write_options(folder: str, command: Mapping[str, object], *parts: "DataclassInstance") -> None:
    """Write the options of a run to `config.json`.

    Args:
        folder: output folder of the run, made where it is missing.
        command: options of the command that started the run, such as the model and the data; {} for none.
        parts: dataclasses of options.
    """
    options = dict(command) | {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    write_json(make_folder(folder) / "config.json", options)


class RunLog:
    """Log the steps of one run, as a context manager that closes its bar and its tracker.

    `log.jsonl` in the output folder gets a line for each logged step, and loses those of an earlier run in the folder
    that were after the step at which this one begins. The main process alone writes.

    Args:
        config: options of the run.
        accelerator: made with `log_with` from `report_to`.
        step: number of steps taken before.

    Attributes:
        last_loss: last logged loss; None where it was not finite, or nothing was logged.

    Raises:
        RefusedInputError: the output folder cannot be made.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, step: int) -> None:
        self._accelerator, self._writes = accelerator, accelerator.is_main_process
        self._path = make_folder(config.output_dir) / "log.jsonl"
        self.last_loss: float | None = None
        self._started = self._last_time = time.monotonic()
        self._images = 0
        self._cut(step)
        if accelerator.log_with:
            options = {name: _plain(value) for name, value in dataclasses.asdict(config).items()}
            accelerator.init_trackers(PROJECT, config=options)
        self._progress = tqdm(
            total=config.max_train_steps, initial=step, desc=config.objective, unit="step", disable=not self._writes
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.close()
        # Not `end_training`, which would also destroy the process group that later steps of this trainer need.
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []

    @property
    def seconds(self) -> float:
        """Wall time since the log was opened."""
        return time.monotonic() - self._started

    def count(self, images: int) -> None:
        """Count a step that trained on so many images over all processes."""
        self._images += images
        self._progress.update()

    def write(
        self, step: int, loss: float, lr: float, skipped_steps: int, parts: Mapping[str, float] | None = None
    ) -> None:
        """Log a step, with the images per second since the step that was logged before it.

        Args:
            step: number of steps taken.
            loss: loss of the last step; it may be NaN or infinite.
            lr: learning rate of the next step.
            skipped_steps: number of steps skipped so far.
            parts: parts of the loss by name, which may be NaN or infinite, too; None for a loss of one part.
        """
        parts = parts or {}
        now = time.monotonic()
        rate = self._images / (now - self._last_time)
        self._last_time, self._images = now, 0
        # JSON has no NaN: the loss of a skipped step is null.
        self.last_loss = loss if math.isfinite(loss) else None
        self._progress.set_postfix(loss=f"{loss:.4f}", images_s=f"{rate:.1f}")
        if not self._writes:
            return
        row = {"step": step, "loss": self.last_loss, "lr": lr, "images_per_second": rate}
        finite = {name: value if math.isfinite(value) else None for name, value in parts.items()}
        self._append(row | {"skipped_steps": skipped_steps, **finite})
        self._accelerator.log({"loss": loss, "lr": lr, "images_per_second": rate, **parts}, step=step)

    def write_validation(self, step: int, losses: Sequence[float]) -> None:
        """Log the loss on held-out samples.

        Args:
            step: number of steps taken.
            losses: mean loss of each segment of flow time, from noise to image; it may be NaN or infinite.
        """
        mean = sum(losses) / len(losses)
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        self._append({"step": step, "validation_loss": mean if math.isfinite(mean) else None, "by_time": finite})
        edges = [segment / len(losses) for segment in range(len(losses))]
        by_time = {f"validation_loss/t={edge:.3f}": loss for edge, loss in zip(edges, losses, strict=True)}
        self._accelerator.log({"validation_loss": mean, **by_time}, step=step)

    def _append(self, row: Mapping[str, object]) -> None:
        """Append a row to the log; a log that cannot be written does not stop the run."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("%s: step %s is not logged (%s)", self._path, row["step"], error.strerror)

    def _cut(self, step: int) -> None:
        """Drop the rows after `step`: a run logged them that was killed, and these steps are taken again."""
        if not self._writes or not self._path.exists():
            return

        def stays(line: str) -> bool:
            try:
                return line.endswith("\n") and bool(json.loads(line)["step"] <= step)
            except (ValueError, TypeError, KeyError):  # this line is not a row, or a power cut damaged it
                return False

        lines = self._path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if stays(line)]
        if kept != lines:
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(kept))


def _plain(value: object) -> object:
    """Return an option as the trackers take it: a number, a text, a truth value or None; anything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
