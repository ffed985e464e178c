"""Fixtures of the tests of kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that no program writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops serve CPU tensors too, also in float64: by their CPU implementation, plain torch."""
    for name in ("align", "velocity_loss"):
        monkeypatch.setattr(sys.modules[f"d2f_fast.kernels.{name}"], "serves", lambda *_: True)


@pytest.fixture
def compile_ahead() -> Callable[..., dict[str, dict[str, int]]]:
    """Return a function that runs a script `aot_<kernel>.py`, and returns the counts of each kernel it compiled."""

    def run(script: str, *arguments: str) -> dict[str, dict[str, int]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)])
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counts: dict[str, dict[str, int]] = json.loads(done.stdout)
        return counts

    return run
