"""Generate latents with optimum-onnx from an export folder, in optimum-onnx's own environment.

optimum_client.py FOLDER NOISE.npy OUTPUT.npz OPTIONS.json
"""

import json
import sys

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline


def main() -> None:
    folder, noise, output, options = sys.argv[1:]
    pipeline = ORTDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with open(options, encoding="utf-8") as file:
        calls = json.load(file)
    latents = torch.from_numpy(np.load(noise))
    results = {}
    for name, call in calls.items():
        results[name] = np.asarray(pipeline(latents=latents, output_type="latent", **call).images)
        results[f"{name}_timesteps"] = np.asarray(pipeline.scheduler.timesteps)
        results[f"{name}_sigmas"] = np.asarray(pipeline.scheduler.sigmas)
    np.savez(output, pipeline=type(pipeline).__name__, **results)


if __name__ == "__main__":
    main()
