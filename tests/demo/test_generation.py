"""Test the generation of images."""

import pytest
import torch

from d2f_fast.demo.generation import ImageGenerator, start_noise
from d2f_fast.demo.samplers import DDIM, DPM, FLOW
from d2f_fast.models.base_model import BaseModel

PROMPTS = ["a cat on a red background", "a boot on a black background"]


def test_two_steps_of_dpm_solver_equal_ddim(model: BaseModel) -> None:
    generator = ImageGenerator(model, model.alignment, guidance_scale=2.0)
    images = [generator.generate(PROMPTS, start_noise(2, model, 0), sampler, 2) for sampler in (DDIM, DPM)]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)
    longer = [generator.generate(PROMPTS, start_noise(2, model, 0), sampler, 4) for sampler in (DDIM, DPM)]
    assert (longer[1] - longer[0]).abs().max() > 1e-3


def test_images_do_not_depend_on_the_batch_size(model: BaseModel) -> None:
    counted: list[int] = []
    noise = start_noise(2, model, 0)
    whole = ImageGenerator(model, model.alignment, 2.0).generate(PROMPTS, noise, FLOW, 2)
    parts = ImageGenerator(model, model.alignment, 2.0, batch_size=1, on_batch=counted.append).generate(
        PROMPTS, noise, FLOW, 2
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert counted == [2, 2]
    assert whole.abs().max() <= 1


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [1, 2]), (8, [4, 4]), (17, [4, 4, 4, 5])])
def test_batches_are_divided_equally_among_threads(model: BaseModel, count: int, expected: list[int]) -> None:
    counted: list[int] = []
    generator = ImageGenerator(model, model.alignment, 2.0, batch_size=5, on_batch=counted.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images = generator.generate(["a cat on a red background"] * count, start_noise(count, model, 0), FLOW, 1)
    finally:
        torch.set_num_threads(threads)
    assert sorted(counted) == expected and len(images) == count
