"""Tests of environment.sh and of the Makefile that calls it, with a stand-in for Python and pip."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EDITABLE = "-e .[dev] --config-settings editable_mode=compat"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"

# It answers the questions that environment.sh asks an interpreter, and appends what pip is asked to a file.
PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit "${UNFIT:-0}" ;;
  --version) echo "Python 3.9.18" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo "$*" >>"$PIP_LOG"; case "$*" in *--index-url*) exit "${NO_BUILD:-0}" ;; esac ;;
  "-m pytest"*) echo "pytest ran: $*" ;;
  "- "*) echo "a description of $2" ;;
esac
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def pip_log(tmp_path: Path) -> Path:
    """File of the arguments that the stand-in for pip was called with, one call a line."""
    path = tmp_path / "pip.log"
    path.touch()
    return path


@pytest.fixture
def run(tmp_path: Path, pip_log: Path) -> Run:
    """Run a command at the root of the checkout with the stand-in as Python, and return the finished process."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run_command(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        given = {"TORCH_INDEX", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ARGS"}
        environment = {name: value for name, value in os.environ.items() if name not in given}
        environment |= {"PYTHON": str(tmp_path / "python"), "PIP_LOG": str(pip_log), **variables}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run_command


@pytest.fixture
def create(run: Run, tmp_path: Path) -> Run:
    """Create the environment in a folder whose name has a space."""
    return lambda **variables: run("bash", "environment.sh", str(tmp_path / "a folder"), **variables)


@pytest.fixture
def without_gpu() -> None:
    """Skip the test on a machine with an NVIDIA GPU, which environment.sh cannot be made to overlook."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has an NVIDIA GPU")


def test_environment_gets_the_package_and_a_description(create: Run, pip_log: Path, tmp_path: Path) -> None:
    assert create(TORCH_INDEX="").returncode == 0
    assert pip_log.read_text() == f"-m pip install --no-compile -c constraints.txt {EDITABLE}\n"
    assert (tmp_path / "a folder/installed.txt").read_text() == f"a description of {tmp_path / 'a folder'}\n"


@pytest.mark.usefixtures("without_gpu")
def test_cpu_build_of_torch_is_taken_where_there_is_no_gpu(create: Run, pip_log: Path) -> None:
    assert create().returncode == 0
    first, second = pip_log.read_text().splitlines()
    assert f"--no-deps --index-url {CPU_BUILDS}" in first and first.split()[-1].startswith("torch==")
    assert second.endswith(EDITABLE)


@pytest.mark.usefixtures("without_gpu")
def test_default_build_of_torch_is_taken_where_the_cpu_index_has_none(create: Run, pip_log: Path) -> None:
    done = create(NO_BUILD="1")
    assert done.returncode == 0
    assert f"at {CPU_BUILDS}: taking the build that pip finds by itself" in done.stdout
    assert pip_log.read_text().splitlines()[-1].endswith(EDITABLE)


def test_default_build_of_torch_is_taken_where_there_is_a_gpu(create: Run, pip_log: Path, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert create(PATH=f"{tmp_path}:{os.environ['PATH']}").returncode == 0
    assert "--index-url" not in pip_log.read_text()


def test_torch_index_chooses_where_torch_comes_from(create: Run, pip_log: Path) -> None:
    assert create(TORCH_INDEX="https://example.org/simple").returncode == 0
    assert "--index-url https://example.org/simple torch==" in pip_log.read_text()


def test_torch_index_without_the_build_is_refused(create: Run, tmp_path: Path) -> None:
    done = create(TORCH_INDEX="https://example.org/simple", NO_BUILD="1")
    assert done.returncode == 1
    assert "environment.sh: TORCH_INDEX=https://example.org/simple has no torch==" in done.stderr
    assert not (tmp_path / "a folder/installed.txt").exists()


def test_unsuitable_python_is_refused_in_one_line(create: Run, tmp_path: Path) -> None:
    done = create(UNFIT="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "is not Python 3.11 or 3.12 with its venv module: Python 3.9.18" in done.stderr
    assert not (tmp_path / "a folder").exists()


def test_machine_without_a_suitable_python_is_told_in_one_line(create: Run, tmp_path: Path) -> None:
    for name in ("python3", "python3.12", "python3.11", "python"):
        (tmp_path / name).write_text(PYTHON)
        (tmp_path / name).chmod(0o755)
    done = create(UNFIT="1", PYTHON="", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "found no Python 3.11 or 3.12" in done.stderr and "python3 is: Python 3.9.18" in done.stderr


def test_make_installs_once_and_again_after_a_change(run: Run, pip_log: Path, tmp_path: Path) -> None:
    command = ("make", "test", f"VENV={tmp_path / 'venv'}", "TORCH_INDEX=", "PYTEST_ARGS=-x tests/flow")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f"a description of {tmp_path / 'venv'}\n" in done.stdout
    assert "pytest ran: -m pytest -x tests/flow\n" in done.stdout
    assert run(*command).returncode == 0
    slow = run("make", "test-slow", *command[2:])
    assert slow.stdout.splitlines()[-1] == "pytest ran: -m pytest -m slow and not gpu -x tests/flow"
    assert len(pip_log.read_text().splitlines()) == 1
    assert run(*command, "--what-if=constraints.txt").returncode == 0
    assert len(pip_log.read_text().splitlines()) == 2
