"""Tests of `metrics.json`, which a command writes beside its results."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from d2f_fast.files.run_record import write_metrics


def test_metrics_name_the_command_the_versions_and_the_results(tmp_path: Path) -> None:
    rows = [{"sampler": "ddim", "steps": 4, "frechet_distance": 12.5}]
    path = write_metrics(tmp_path, "d2f demo", 7, 1.23456, rows)
    assert path == tmp_path / "metrics.json"
    metrics = json.loads(path.read_text())
    assert (metrics["command"], metrics["seed"], metrics["seconds"]) == ("d2f demo", 7, 1.235)
    assert metrics["results"] == rows
    assert metrics["versions"]["python"] == platform.python_version()
    assert metrics["versions"]["diffusers"] == version("diffusers")
    assert metrics["peak_memory_bytes"] > 0 and metrics["device"]


def test_metrics_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_metrics(tmp_path, "d2f demo", seed, 0.0, [])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads((tmp_path / "metrics.json").read_text())["seed"] == 2
