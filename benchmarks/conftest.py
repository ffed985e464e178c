"""What every benchmark table and JSON file must say about where it was measured."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch


def _measured_on() -> dict[str, str]:
    """Device and package versions of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    try:
        triton_version = version("triton")
    except PackageNotFoundError:
        triton_version = "none"
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": str(torch.get_num_threads()),
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(_measured_on())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line("measured on: " + ", ".join(f"{key} {value}" for key, value in _measured_on().items()))
