"""`d2f demo`: the demonstration on the embedded miniature."""

from dataclasses import dataclass
from typing import Any

from d2f_fast.config import (
    check_seed,
)
from d2f_fast.models.library_messages import silence_libraries


@dataclass(frozen=True)
class Demo:
    """Finetune the miniature four ways, sample each by every route, and write report.html.

    Args:
        output_dir: of the report; overwritten.
        seed: of training and sampling.
        dry_run: print the resolved options and stop.
        json: print the result as JSON.
    """

    output_dir: str = "demo"
    seed: int = 0
    dry_run: bool = False
    json: bool = False

    def run(self) -> dict[str, Any]:
        """Run it all, and return where the report is."""
        check_seed(self.seed)
        silence_libraries()
        from d2f_fast.demo.run import run_demo

        return {"output": str(run_demo(self.output_dir, self.seed))}
