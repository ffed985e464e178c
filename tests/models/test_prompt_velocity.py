"""The velocity of prompts, against the stock pipeline with this package's scheduler."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.integrate import sample_flow

PROMPTS = ["ab", "c"]


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """Return the pixels of images, [B, H, W, 3]."""
    return torch.stack([torch.from_numpy(np.array(image, np.int16)) for image in images])


@pytest.fixture(params=["sd", "sdxl"])
def any_model(request: pytest.FixtureRequest, pipeline: Any) -> BaseModel:
    """Return a tiny model of either kind."""
    return BaseModel(pipeline if request.param == "sd" else request.getfixturevalue("tiny_xl"))


@pytest.mark.parametrize(("guidance_scale", "negative"), [(1.0, None), (3.0, None), (3.0, "d")])
def test_euler_images_are_those_of_the_stock_pipeline(
    any_model: BaseModel, guidance_scale: float, negative: str | None
) -> None:
    model, side = any_model, 16
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = None if negative is None else model.encode_prompts([negative])

    def images(guidance_scale: float) -> torch.Tensor:
        with torch.no_grad():
            velocity = prompt_velocity(model, model.flow, PROMPTS, side, side, guidance_scale, condition)
            states = sample_flow(velocity, noise, times=model.flow.times(3), return_intermediates=True)
            assert len(states) == 4 and torch.equal(states[0], noise)
            return pixels(to_pil(model.decode(states[-1])))

    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "negative_prompt": negative or ""}
    generator = torch.Generator().manual_seed(3)
    want = pixels(generate(model.pipeline, PROMPTS, height=side, width=side, generator=generator, **options))
    assert (images(guidance_scale) - want).abs().max() <= 1
    assert (images(guidance_scale + 2) - want).abs().max() > 1  # The images are not all black or white.
