"""Start accelerate in this process, or refuse settings under which the run would not be the one that was asked for."""

import os
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from d2f_fast.config import TrainingConfig
from d2f_fast.training.agreement import connecting
from d2f_fast.training.launch import check_launch, check_processes, processes_asked_for
from d2f_fast.training.run_log import check_tracker


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator of this process, with the tracker of the run.

    Args:
        config: options of the run.

    Raises:
        RefusedInputError: the precision or the tracker cannot be used, or accelerate does not see all processes.
        LostProcessError: the processes cannot connect.
    """
    check_launch(config, os.environ)
    check_tracker(config.report_to)
    output = Path(config.output_dir)
    with connecting() if processes_asked_for(os.environ) > 1 else nullcontext():
        accelerator = Accelerator(
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(output), str(output / "logs")),
        )
    check_processes(os.environ, accelerator.num_processes)
    return accelerator
