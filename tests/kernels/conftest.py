"""What the tests of kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` is full of NaN: an element that no program writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
