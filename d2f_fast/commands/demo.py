"""`d2f demo`: show what the package does, on the embedded miniature model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_fast.config import check_options, check_seed, option
from d2f_fast.models.library_messages import silence_libraries


@dataclass(frozen=True)
class Demo:
    """Train and sample the embedded miniature model, compare the results, and write a report.

    Args:
        output_dir: Folder that receives report.html, images, LoRA files and metrics.json; files of an earlier demo are
            replaced. A demo that was stopped keeps its finished trainings and measurements there, and the same command
            goes on from them.
        seed: Seed of training and sampling, from 0 to 2**63 - 1. The same seed gives the same report on one machine.
        dry_run: Check the options, print those that would be used, as JSON, and stop. It is off by default.
        json: Print {"output": the path of the report} as one line of JSON, in place of the path alone. It is off by
            default.
    """

    output_dir: str = "demo"
    seed: int = option(None, 0, check_seed)
    dry_run: bool = False
    json: bool = False

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
