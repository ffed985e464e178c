"""Launches under which the run would not be the one that was asked for."""

import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

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


@pytest.mark.parametrize(
    ("version", "cure"),
    [
        ("2.13.0", "pip install lpips, or leave lpips_weight out"),
        ("2.13.0+cpu", "pip install torchvision --index-url https://download.pytorch.org/whl/cpu, then pip install"),
        ("2.13.0+rocm6.4", "pip install torchvision --index-url https://download.pytorch.org/whl/rocm6.4, then pip"),
        ("2.13.0a0+git1234", "pip install lpips, or leave"),  # This one was built from source.
    ],
)
def test_packages_of_lpips_come_from_where_torch_came_from(
    version: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    lpips = ModuleType("lpips")
    lpips.__spec__ = ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    config = TrainingConfig(distill=True, lpips_weight=1.0)
    with pytest.raises(RefusedInputError, match=re.escape(f"lpips_weight needs torchvision: {cure}")):
        check_launch(config, {})
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(RefusedInputError, match="lpips_weight needs torchvision and lpips: pip install "):
        check_launch(config, {})
    check_launch(TrainingConfig(distill=True), {})


@pytest.mark.slow
def test_accelerate_launch_of_two_processes_on_a_cpu_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "d2f_fast"]
    command += ["train", "--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "d2f: accelerate launch was asked for several processes and has started one" in done.stderr
    assert done.returncode != 0
