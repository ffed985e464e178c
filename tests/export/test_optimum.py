"""Tests of the export folder in optimum-onnx, which needs an environment of its own (CONTRIBUTING.md tells how)."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from d2f_fast import Alignment
from d2f_fast.export.verify import relative_errors

INTERPRETER = os.environ.get("D2F_OPTIMUM_PYTHON")
CLIENT = Path(__file__).with_name("optimum_client.py")


@pytest.mark.skipif(INTERPRETER is None, reason="D2F_OPTIMUM_PYTHON names no interpreter with optimum-onnx")
def test_optimum_generates_the_results_diffusers(exported, tiny_folder, tmp_path):
    source = StableDiffusionPipeline.from_pretrained(tiny_folder)
    source.set_progress_bar_config(disable=True)
    common = {"prompt": "ab c", "guidance_scale": 5.0, "height": 16, "width": 32}
    calls = {
        "stock": common | {"num_inference_steps": 4},
        "flow": common | {"sigmas": Alignment.from_scheduler(source.scheduler).sigmas(4)},
    }
    source.scheduler = EulerDiscreteScheduler.from_config(source.scheduler.config, timestep_spacing="trailing")
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 16), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    # The client must not import the packages of the checkout.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    files = [exported[0], *(tmp_path / name for name in ("noise.npy", "latents.npz", "calls.json"))]
    done = subprocess.run(
        [str(INTERPRETER), str(CLIENT), *map(str, files)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = np.load(tmp_path / "latents.npz")
    assert results["pipeline"] == "ORTStableDiffusionPipeline"
    # The stock Euler scheduler appends nothing to a list of sigmas, whose last 0 ends the fourth step.
    for name in calls:
        assert results[f"{name}_timesteps"].shape == (4,) and results[f"{name}_sigmas"][-1] == 0
    table = json.loads((exported[0] / "unet/steps.json").read_text())["4"]
    np.testing.assert_allclose(results["flow_timesteps"], table["timesteps"], atol=0.05)
    found = {}
    for name, call in calls.items():
        want = source(latents=torch.from_numpy(noise), output_type="latent", **call).images.numpy()
        found[name] = relative_errors(results[name], want)[0]
    print(f"\nrelative RMS of optimum's latents: {found}")
    assert max(found.values()) <= 1e-5
    assert relative_errors(results["flow"], results["stock"])[0] > 0.01
