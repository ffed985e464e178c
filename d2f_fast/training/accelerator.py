"""Start accelerate in this process, or refuse settings under which the run would not be the one that was asked for."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.training.run_log import check_tracker


def start_accelerator(config: TrainingConfig, precision: str) -> Accelerator:
    """Return the accelerator of this process, with the tracker of the run.

    Args:
        config: options of the run.
        precision: type of autocast, from the options or from `accelerate launch`.

    Raises:
        RefusedInputError: the precision or the tracker cannot be used, or accelerate does not see all processes.
    """
    if precision not in ("no", "bf16"):  # before Accelerator, which refuses fp16 on a CPU in its own words
        raise RefusedInputError(f"mixed_precision must be no or bf16, got {precision}")
    check_tracker(config.report_to)
    output = Path(config.output_dir)
    accelerator = Accelerator(
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(output), str(output / "logs")),
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:  # each would train alone, and overwrite the files of the others
        raise RefusedInputError(
            f"{world} processes were started, and accelerate sees {accelerator.num_processes}: on a CPU set"
            " ACCELERATE_USE_CPU=true"
        )
    return accelerator
