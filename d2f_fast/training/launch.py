"""Refuse a launch under which the run would not be the one that was asked for. Imports no torch."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError

# Variables in which launchers say how many processes they have started: torchrun and accelerate, Open MPI, other MPI
# implementations, and the steps of Slurm.
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# Packages of the trackers whose name is not that of the package.
_TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
_LPIPS_PACKAGES = ("torchvision", "lpips")


def processes_asked_for(environment: Mapping[str, str]) -> int:
    """Return the number of processes that a launcher says it has started, 1 without a launcher.

    Args:
        environment: Environment variables of this process.
    """
    return next((int(environment[name]) for name in _SIZES if environment.get(name, "").isdecimal()), 1)


def precision_of(config: TrainingConfig, environment: Mapping[str, str] = os.environ) -> str:
    """Return the type of autocast: that of the options, or else what `accelerate launch` was set to, or else "no".

    Args:
        config: Options of the run.
        environment: Environment variables of this process, which are the default.

    Raises:
        RefusedInputError: The precision is neither "no" nor "bf16".
    """
    precision = config.mixed_precision or environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise RefusedInputError(
            f"mixed_precision must be no or bf16, got {precision} from accelerate launch: give --mixed_precision"
        )
    return precision


def check_launch(config: TrainingConfig, environment: Mapping[str, str]) -> None:
    """Refuse a precision or a package that cannot be used, and a launcher that has started too few processes.

    Args:
        config: Options of the run.
        environment: Environment variables of this process.

    Raises:
        RefusedInputError: The launch would run something else than was asked for.
    """
    precision_of(config, environment)
    check_tracker_package(config.report_to)
    check_lpips_package(config)
    # accelerate sets the first two for several processes on a CPU, but starts them by MPI only, and else just one.
    asked = {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"} <= environment.keys()
    if asked and not any(name in environment for name in ("RANK", "LOCAL_RANK", *_SIZES)):
        raise RefusedInputError(
            "accelerate launch was asked for several processes and has started one, as it does without --multi_gpu:"
            " add --multi_gpu for GPUs, use torchrun --nproc_per_node N on a CPU, or ask for 1 process (and unset"
            " MASTER_ADDR and MASTER_PORT)"
        )


def check_processes(environment: Mapping[str, str], seen: int) -> None:
    """Refuse processes that would each train alone, and overwrite the files of the others.

    Args:
        environment: Environment variables of this process.
        seen: Number of processes that accelerate sees.

    Raises:
        RefusedInputError: A launcher has started another number of processes.
    """
    if (asked := processes_asked_for(environment)) != seen:
        raise RefusedInputError(
            f"{asked} processes were started, and accelerate sees {seen}: start them with torchrun or accelerate"
            " launch, and on a CPU set ACCELERATE_USE_CPU=true"
        )


def check_tracker_package(report_to: str) -> None:
    """Refuse a tracker whose package is not installed.

    Args:
        report_to: Name of a tracker, as accelerate has it, or "none".

    Raises:
        RefusedInputError: The package is missing.
    """
    packages = _TRACKER_PACKAGES.get(report_to, (report_to,))
    if report_to != "none" and not any(map(importlib.util.find_spec, packages)):
        raise RefusedInputError(
            f"report_to is {report_to}, which is not installed: pip install {report_to}, or set report_to to none"
        )


def check_lpips_package(config: TrainingConfig) -> None:
    """Refuse LPIPS in the loss where its package or torchvision, which has its networks, is not installed.

    Args:
        config: Options of the run.

    Raises:
        RefusedInputError: A package is missing.
    """
    missing = [name for name in _LPIPS_PACKAGES if importlib.util.find_spec(name) is None]
    if config.lpips_weight and missing:
        raise RefusedInputError(
            f"lpips_weight needs {' and '.join(missing)}: {_lpips_commands()}, or leave lpips_weight out"
        )


def _lpips_commands() -> str:
    """Return the commands that install what LPIPS needs.

    torchvision must be of the same build as torch. PyPI's cannot be imported with a build of another index of torch,
    which says in its version from which one it came, as in "2.13.0+cpu"; and diffusers then cannot be imported either.
    """
    build = importlib.metadata.version("torch").partition("+")[2]
    if not re.fullmatch(r"cpu|xpu|cu\d+|rocm[\d.]+", build):
        return "pip install lpips"
    return f"pip install torchvision --index-url https://download.pytorch.org/whl/{build}, then pip install lpips"
