"""`d2f demo`: show what the package does, on the embedded miniature model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_fast.config import check_options, check_seed, option
from d2f_fast.models.library_messages import silence_libraries


@dataclass(frozen=True)
class Demo:
    """Train and sample the miniature, a tiny model in this package, and write a report.

    The miniature generates emoji of 32 pixels. Nothing is downloaded. It runs on a CPU, in about ten minutes of its
    time.

    Args:
        output_dir: Folder for report.html, images, LoRA files and metrics.json. The files of a finished demo are
            replaced; a demo that was stopped goes on from the trainings that it has finished.
        seed: Seed of training and sampling. The same seed gives the same report on one machine.
        dry_run: Check the options, print them as JSON, and stop.
        json: Print {"output": the path of the report} as one line of JSON, in place of the path alone.
    """

    output_dir: str = option("essential", "demo", metavar="FOLDER")
    seed: int = option("essential", 0, check_seed)
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse options that cannot be used.

        Raises:
            RefusedInputError: The seed is out of range, or the output folder is a file.
        """
        from d2f_fast.files.atomic import make_folder

        check_options(self)
        if Path(self.output_dir).exists():
            make_folder(self.output_dir)  # This refuses a file of that name.

    def run(self) -> dict[str, Any]:
        """Run the demonstration, and return the path of the report.

        Raises:
            RefusedInputError: The seed is out of range, or the output folder cannot be made, is in use, or holds parts
                of an unfinished demo with other settings.
        """
        from d2f_fast.files.lock import locked_folder

        self.check()
        with locked_folder(self.output_dir):  # Before the slow imports, so that a refusal comes at once.
            silence_libraries()
            from d2f_fast.demo.run import run_demo
            from d2f_fast.training.signals import stop_signals

            # The demo keeps whole trainings only, so that a signal in one of them ends the demo at once.
            with stop_signals(lambda: False, announce=False):
                return {"output": str(run_demo(self.output_dir, self.seed))}
