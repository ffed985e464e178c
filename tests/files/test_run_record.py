"""The record that a command writes beside its output."""

import json
import platform
from importlib.metadata import version

import pytest
import torch

from d2f_fast.files.run_record import write_run_record


def test_record_has_the_run_the_machine_and_the_results(tmp_path):
    row = {"sampler": "flow", "steps": 4, "frechet_distance": None}
    path = write_run_record(tmp_path, "d2f sample", 7, 1.23456, [row])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "metrics.json"
    assert (record["command"], record["seed"], record["seconds"], record["results"]) == ("d2f sample", 7, 1.235, [row])
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == version("torch")
    assert record["peak_memory_bytes"] > 0
    gpu = torch.cuda.is_available()
    assert record["device"] == (torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, 1 threads")


def test_results_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_run_record(tmp_path, "d2f sample", 7, 1.0, [{"loss": float("nan")}])
    assert list(tmp_path.iterdir()) == []
