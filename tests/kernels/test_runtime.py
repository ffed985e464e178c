"""The choice between Triton and plain torch, its log messages, and the memory layouts that kernels distinguish."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2f_fast.kernels import runtime


@pytest.fixture(autouse=True)
def _forget_what_was_said() -> Iterator[None]:
    runtime.triton_available.cache_clear()
    runtime._log_once.cache_clear()
    yield
    runtime.triton_available.cache_clear()
    runtime._log_once.cache_clear()


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_plain_torch_runs_without_a_gpu(device: torch.device | str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=runtime.__name__):
        assert [runtime.kernel_path(device) for _ in range(3)] == ["torch"] * 3
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"they need a GPU, not {torch.device(device).type}" in caplog.text


def test_triton_runs_on_a_gpu_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", torch)  # any module will do: only the success of the import counts
    with caplog.at_level(logging.INFO, logger=runtime.__name__):
        assert runtime.kernel_path("cuda:1") == "triton"
    assert caplog.messages == ["d2f_fast: the Triton kernels run"]


def test_gpu_without_triton_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail
    assert not runtime.triton_available()
    assert [runtime.kernel_path("cuda") for _ in range(3)] == ["torch"] * 3
    assert [(record.levelname, "pip install triton" in record.message) for record in caplog.records] == [
        ("WARNING", True)
    ]


def test_importing_the_module_does_not_import_triton() -> None:
    code = "import sys, d2f_fast.kernels.runtime; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def operand(dtype: torch.dtype = torch.float32, ndim: int = 4, device: str = "cuda") -> Any:
    """Return a stand-in with what `serves` reads of a tensor; torch without CUDA aborts on fake tensors of a GPU."""
    return SimpleNamespace(dtype=dtype, ndim=ndim, device=torch.device(device))


def test_alignment_ops_serve_what_their_kernels_can_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    t = operand(ndim=1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert runtime.serves(t, operand(), operand(dtype))
        assert not runtime.serves(operand(ndim=1, device="cpu"), operand(dtype, device="cpu"))
    assert not runtime.serves(operand(torch.float64, ndim=1), operand())
    assert not runtime.serves(t, operand(), operand(torch.float64))
    assert not runtime.serves(t, operand(ndim=3)) and not runtime.serves(t, operand(ndim=5))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not runtime.serves(t, operand())


def test_channels_last_excludes_tensors_that_are_contiguous_too() -> None:
    plain = torch.zeros(2, 4, 3, 5)
    assert runtime.is_channels_last(plain.to(memory_format=torch.channels_last))
    assert not runtime.is_channels_last(plain)
    assert not runtime.is_channels_last(torch.zeros(2, 4, 1, 1).to(memory_format=torch.channels_last))
    assert not runtime.is_channels_last(torch.zeros(2, 3, 4))
    assert not runtime.is_channels_last(plain.to(memory_format=torch.channels_last)[..., ::2])
