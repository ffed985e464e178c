"""Launches under which the run would not be the one that was asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.training.launch import check_launch, check_processes, precision_of, processes_asked_for

# What `accelerate launch --cpu` sets: with --num_processes 1, and with 2, for which it starts one process all the same.
ONE = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
TWO = ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 3),
        ({"WORLD_SIZE": "many"}, 1),
    ],
    ids=str,
)
def test_number_of_processes_is_read_from_the_launcher(environment: dict[str, str], asked: int) -> None:
    assert processes_asked_for(environment) == asked
    check_processes(environment, asked)
    with pytest.raises(RefusedInputError, match=f"{asked} processes were started, and accelerate sees 7: start them"):
        check_processes(environment, 7)


def test_launcher_that_starts_one_of_several_processes_is_refused() -> None:
    for environment in ({}, ONE, TWO | {"RANK": "0", "WORLD_SIZE": "2"}, TWO | {"OMPI_COMM_WORLD_SIZE": "2"}):
        check_launch(TrainingConfig(), environment)
    with pytest.raises(RefusedInputError, match=r"asked for several processes and has started one, .* --multi_gpu"):
        check_launch(TrainingConfig(), TWO)


def test_precision_of_the_options_comes_before_that_of_the_launcher() -> None:
    assert precision_of(TrainingConfig(), {}) == "no"
    assert precision_of(TrainingConfig(), {"ACCELERATE_MIXED_PRECISION": "bf16"}) == "bf16"
    fp16 = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    assert precision_of(TrainingConfig(mixed_precision="no"), fp16) == "no"
    with pytest.raises(RefusedInputError, match="mixed_precision must be no or bf16, got fp16 from accelerate launch"):
        check_launch(TrainingConfig(), fp16)


def test_missing_tracker_is_refused() -> None:
    check_launch(TrainingConfig(report_to="tensorboard"), {})
    with pytest.raises(RefusedInputError, match="report_to is dvclive, which is not installed: pip install dvclive"):
        check_launch(TrainingConfig(report_to="dvclive"), {})


@pytest.mark.slow
def test_accelerate_launch_of_two_processes_on_a_cpu_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "d2f_fast"]
    command += ["train", "--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "d2f: accelerate launch was asked for several processes and has started one" in done.stderr
    assert done.returncode != 0
