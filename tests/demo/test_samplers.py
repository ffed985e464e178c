"""Test the demo's samplers against diffusers, and with an ideal network."""

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from d2f_fast.demo.samplers import DDIM, DPM, SAMPLERS, Sampler, sample_latents
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity

PROMPTS = ["a cat on a red background", "a boot on a black background"]


def stock_sample(model: BaseModel, scheduler: Any, noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Return the latents that the stock pipeline samples, before decoding."""
    return model.pipeline.__class__(
        **model.pipeline.components | {"scheduler": scheduler}, requires_safety_checker=False
    )(
        PROMPTS,
        num_inference_steps=scheduler.wanted_steps,
        guidance_scale=guidance_scale,
        latents=noise,
        output_type="latent",
    ).images


@pytest.mark.parametrize("steps", [2, 4, 25])
@pytest.mark.parametrize("sampler", [DDIM, DPM])
def test_stock_samplers_give_the_latents_of_the_stock_pipeline(model: BaseModel, sampler: Sampler, steps: int) -> None:
    options = {"timestep_spacing": "trailing"}
    if sampler == DDIM:
        scheduler: Any = DDIMScheduler.from_config(model.pipeline.scheduler.config, set_alpha_to_one=True, **options)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(model.pipeline.scheduler.config, **options)
    scheduler.wanted_steps = steps
    noise = torch.randn(2, 4, 16, 16)
    expected = stock_sample(model, scheduler, noise, 3.0)
    condition, negative = (model.encode_prompts(p)["encoder_hidden_states"] for p in (PROMPTS, ["", ""]))
    velocity = unet_velocity(model.unet, model.alignment, condition, negative, 3.0)
    with torch.no_grad():
        got = sample_latents(velocity, noise, sampler, steps, model.alignment, model.pipeline.scheduler)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("naive", [False, True])
def test_every_sampler_ends_in_the_data_of_an_ideal_network(sampler: Sampler, naive: bool) -> None:
    """The ideal velocity towards one image is constant along the path, so that every sampler must end in the image."""
    base = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    flow = NaiveFlow() if naive else Alignment.from_scheduler(base)
    target, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    seen = []

    def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t))
        return (target - x_t) / (1 - t)

    latents = sample_latents(velocity, noise, sampler, 4, flow, base)
    torch.testing.assert_close(latents, target, rtol=1e-3, atol=1e-3)
    assert len(seen) == 4
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    starts_at_zero = sampler.name == "flow"
    expected = 0.001 if sampler == DPM and naive else 0.0 if starts_at_zero else Alignment.from_scheduler(base).t_min
    assert seen[0] == pytest.approx(expected, abs=1e-4)
