"""Start of a flow from images, in closed form, and in diffusers' own pipeline."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.solve import Sampling, generate_images
from d2f_fast.models.source_start import start_of_flow
from d2f_fast.sampling.scheduler import Diff2FlowScheduler


def random_images(count: int = 2) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def test_start_is_the_mean_of_the_posterior_mixed_with_noise(model: BaseModel) -> None:
    images = random_images()
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    with torch.no_grad():
        mean = model.vae.encode(pixels).latent_dist.mean.double() * model.vae.config.scaling_factor
    torch.testing.assert_close(start_of_flow(model, images, 16, 16).double(), mean, rtol=0, atol=1e-6)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    start = start_of_flow(model, images, 16, 16, 0.3, torch.Generator().manual_seed(3))
    torch.testing.assert_close(start.double(), 0.7 * mean + 0.3 * noise, rtol=0, atol=1e-6)
    everything = start_of_flow(model, images, 16, 16, 1.0, torch.Generator().manual_seed(3))
    assert torch.equal(everything.double(), noise)


def test_stock_pipeline_that_is_given_the_start_as_latents_gives_the_same_image(
    model: BaseModel, pipeline: Any
) -> None:
    start = start_of_flow(model, random_images(1), 16, 16)
    sampling = Sampling(num_inference_steps=3, guidance_scale=1.0, height=16, width=16)
    (ours,) = generate_images(model, ["a"], sampling, noise=start)
    stock = pipeline.scheduler
    try:
        pipeline.scheduler = Diff2FlowScheduler.from_config(stock.config)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 16}
        (other,) = pipeline("a", latents=start, **options).images
    finally:
        pipeline.scheduler = stock
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(other)).max() <= 1
