"""Test the generation of images."""

import pytest
import torch
from diffusers import DDIMScheduler

from d2f_fast.demo.generation import ImageGenerator, start_noise
from d2f_fast.demo.samplers import times_of_ddim
from d2f_fast.models.base_model import BaseModel

PROMPTS = ["a cat on a red background", "a boot on a black background"]


def test_images_at_the_times_of_ddim_are_those_of_the_stock_pipeline(model: BaseModel) -> None:
    pipeline = model.pipeline.__class__(
        **model.pipeline.components | {"scheduler": DDIMScheduler.from_config(model.pipeline.scheduler.config)},
        requires_safety_checker=False,
    )
    noise = start_noise(2, model, 0)
    expected = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt").images
    times = times_of_ddim(pipeline.scheduler, model.alignment, 4)
    images = ImageGenerator(model, model.flow).generate(PROMPTS, noise, times, 3.0)
    torch.testing.assert_close((images + 1) / 2, expected, rtol=0, atol=1e-4)


def test_images_do_not_depend_on_the_batch_size(model: BaseModel) -> None:
    counted: list[int] = []
    noise = start_noise(2, model, 0)
    whole = ImageGenerator(model, model.flow).generate(PROMPTS, noise, 2, 2.0)
    small = ImageGenerator(model, model.flow, batch_size=1, on_batch=counted.append)
    torch.testing.assert_close(small.generate(PROMPTS, noise, 2, 2.0), whole, rtol=1e-4, atol=1e-5)
    assert counted == [4, 4]
    small.generate(PROMPTS, noise, 2)
    assert counted == [4, 4, 2, 2]
    assert whole.abs().max() <= 1


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [1, 2]), (8, [4, 4]), (17, [4, 4, 4, 5])])
def test_batches_are_divided_equally_among_threads(model: BaseModel, count: int, expected: list[int]) -> None:
    counted: list[int] = []
    generator = ImageGenerator(model, model.flow, batch_size=5, on_batch=counted.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images = generator.generate(["a cat on a red background"] * count, start_noise(count, model, 0), 1)
    finally:
        torch.set_num_threads(threads)
    assert sorted(counted) == expected and len(images) == count
