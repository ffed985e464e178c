"""Generate latents with a saved pipeline folder, in an environment of its own with other versions of the libraries.

pipeline_client.py FOLDER NOISE.npy OUTPUT.npy
"""

import sys

import numpy as np
import torch
from diffusers import StableDiffusionPipeline


def main() -> None:
    folder, noise, output = sys.argv[1:]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.load(noise))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32}
    images = pipeline("an owl on a blue background", latents=latents, output_type="latent", **options).images
    np.save(output, images.numpy())


if __name__ == "__main__":
    main()
