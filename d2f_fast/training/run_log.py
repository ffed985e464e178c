"""What a run says of its steps: JSON lines, and TensorBoard where it was asked for."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2f_fast.config import TrainingConfig
from d2f_fast.files.atomic import atomic_path, make_folder

logger = logging.getLogger(__name__)


class RunLog:
    """`log.jsonl`, a line for each logged step, and the same in TensorBoard.

    Args:
        config: of the run.
        writes: whether this process writes; one of a run does.

    Raises:
        RefusedInputError: the output folder cannot be made.
    """

    def __init__(self, config: TrainingConfig, writes: bool) -> None:
        self._path, self._writes = make_folder(config.output_dir) / "log.jsonl", writes
        self._tensorboard: Any = None
        if writes and config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(Path(config.output_dir) / "logs"))

    def cut(self, step: int) -> None:
        """Drop the rows after a step, which a run that was killed had logged and its continuation takes again."""
        if not self._writes or not self._path.exists():
            return

        def stays(line: str) -> bool:
            try:
                return line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):  # no row of ours, or one that a power cut left
                return False

        lines = self._path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if stays(line)]
        if kept != lines:
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row: "step", "loss", "lr", "images_per_second", "skipped_steps"."""
        if not self._writes:
            return
        # JSON has no NaN: the loss of a skipped step is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:  # no reason to stop a run
            logger.warning("%s: step %s is not logged (%s)", self._path, row["step"], error.strerror)
        if self._tensorboard is not None:
            for name in ("loss", "lr", "images_per_second"):
                self._tensorboard.add_scalar(name, row[name], row["step"])

    def close(self) -> None:
        """Bring TensorBoard's rows to disk."""
        if self._tensorboard is not None:
            self._tensorboard.close()
