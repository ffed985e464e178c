"""Solvers along the flow of a model, against the stock pipeline with this package's scheduler."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.config import FixedStepMethod, SamplingMethod, StochasticMethod
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.solve import Solver, prompt_velocity
from d2f_fast.sampling.adaptive import sample_flow_adaptive
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.stochastic import sample_flow_stochastic

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
            states = Solver("euler").solve(velocity, noise, model.flow.times(3))
            assert len(states) == 4 and torch.equal(states[0], noise)
            return pixels(to_pil(model.decode(states[-1])))

    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "negative_prompt": negative or ""}
    generator = torch.Generator().manual_seed(3)
    want = pixels(generate(model.pipeline, PROMPTS, height=side, width=side, generator=generator, **options))
    assert (images(guidance_scale) - want).abs().max() <= 1
    assert (images(guidance_scale + 2) - want).abs().max() > 1  # The images are not all black or white.


def test_every_method_is_that_of_its_function() -> None:
    start, times = torch.randn(2, 3), torch.tensor([0.0, 0.3, 0.7, 1.0])

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * t - x

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    given = {"times": times, "return_intermediates": True}
    want = {name: sample_flow(velocity, start, method=name, **given) for name in get_args(FixedStepMethod)}
    want["dopri5"] = sample_flow_adaptive(velocity, start, rtol=1e-3, atol=1e-4, **given)
    for name in get_args(StochasticMethod):
        want[name] = sample_flow_stochastic(velocity, start, method=name, diffusion=0.5, generator=seeded(), **given)
    assert want.keys() == set(get_args(SamplingMethod))
    for name, states in want.items():
        got = Solver(name, rtol=1e-3, atol=1e-4, diffusion=0.5).solve(velocity, start, times, seeded())
        assert len(got) == 4 and all(torch.equal(*pair) for pair in zip(got, states, strict=True)), name
