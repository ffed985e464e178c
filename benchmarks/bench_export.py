"""Measure `export/to_onnx.py` from its start to the finished, verified folder, with its peak memory and file sizes.

    pytest --benchmark benchmarks/bench_export.py               # the embedded miniature
    pytest --benchmark -m slow benchmarks/bench_export.py       # a model of Stable Diffusion 1.5's size, six minutes

There is no other provider: the time is compared with that of earlier versions. The export refuses a graph that differs
from torch, so that a time is only printed for a right one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "export" / "to_onnx.py"


@pytest.mark.parametrize("model", ["miniature", pytest.param("sd15_size", marks=pytest.mark.slow)])
def test_export(benchmark: Any, model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = model if model == "miniature" else str(request.getfixturevalue("sd15_folder"))
    command = [sys.executable, str(SCRIPT), "--model", source, "--output", str(tmp_path / "graphs"), "--json"]
    done = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, text=True), rounds=1, iterations=1, warmup_rounds=0
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verified"]
    benchmark.extra_info["peak_memory_gib"] = report["peak_memory_bytes"] / 2**30
    benchmark.extra_info["largest_rms"] = max(row["rms"] for row in report["parity"])
    print(f"\n{model}:", {name: round(value, 8) for name, value in benchmark.extra_info.items()})
    benchmark.extra_info["file_mb"] = {name: entry["bytes"] / 1e6 for name, entry in report["files"].items()}
