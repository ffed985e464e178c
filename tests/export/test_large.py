"""Test of a model above protobuf's 2 GiB: Stable Diffusion 1.5's sizes with random weights, six minutes, 8 GiB."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from d2f_fast.export.sampler_graph import count_nodes

SCRIPT = Path(__file__).resolve().parents[2] / "export" / "to_onnx.py"
GIB = 2**30


@pytest.mark.slow
def test_export_of_stable_diffusion_15_size(sd15_folder, tmp_path):
    folder = tmp_path / "graphs"
    command = [sys.executable, str(SCRIPT), "--model", str(sd15_folder), "--output", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    peak = report["peak_memory_bytes"]
    largest = max(row["rms"] for row in report["parity"])
    print(f"\npeak {peak / GIB:.2f} GiB, largest rms {largest:.1e}")
    assert peak <= 8 * GIB
    assert largest <= 5e-6
    assert all(found["ready"] for found in report["tensorrt"].values())
    (data,) = folder.glob("*/*.data")
    assert data == folder / "unet/model.onnx.data" and data.stat().st_size > 2 * GIB
    models = [onnx.load(folder / f"unet/{name}.onnx", load_external_data=False) for name in ("model", "sampler")]
    for name, model in zip(("model", "sampler"), models, strict=True):
        located = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
        assert located == {"model.onnx.data"}
        onnx.checker.check_model(str(folder / f"unet/{name}.onnx"))
    assert (folder / "unet/sampler.onnx").stat().st_size < 1e6
    nodes = [count_nodes(model.graph.node) for model in models]
    assert nodes[1] <= 1.05 * nodes[0]
    random = np.random.default_rng(0)
    feed = {
        "sample": random.standard_normal((1, 4, 16, 8), np.float32),
        "encoder_hidden_states": random.standard_normal((1, 77, 768), np.float32),
    }
    session = onnxruntime.InferenceSession(folder / "unet/model.onnx")
    outputs = {t: session.run(None, feed | {"timestep": np.asarray(t, np.float32)})[0] for t in (673.16, 673, 672)}
    for t in (673, 672):
        assert np.linalg.norm(outputs[673.16] - outputs[t]) > 1e-3 * np.linalg.norm(outputs[t])
