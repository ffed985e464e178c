"""Test the images that the miniature is evaluated on."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from d2f_fast.miniature.evaluate import sample


def test_samples_equal_those_of_the_stock_pipeline(pipe: StableDiffusionPipeline) -> None:
    assert isinstance(pipe.scheduler, DDIMScheduler)
    ours = sample(pipe, ["a cat on a blue background"], guidance=3.0, steps=5, seed=7)
    generator = torch.Generator().manual_seed(7)
    theirs = pipe(
        "a cat on a blue background", num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    torch.testing.assert_close(ours.add(1).div(2), theirs, atol=1e-5, rtol=0)
