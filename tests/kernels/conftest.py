"""Fixtures of the tests of kernels."""

import sys
from collections.abc import Iterator

import pytest
import torch


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
