"""The demo's samplers against diffusers, and on an ideal network."""

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from d2f_fast.demo.exam import noise_of
from d2f_fast.demo.sampling import DDIM, DPM, FLOW, ROUTES, Painter, Route, draw_latents
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity

PROMPTS = ["a cat on a red background", "a boot on a black background"]


def stock_sample(model: BaseModel, scheduler: Any, noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """What the stock pipeline's own loop gives, before decoding."""
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
@pytest.mark.parametrize("route", [DDIM, DPM])
def test_routes_of_stock_samplers_draw_what_the_stock_pipeline_draws(
    model: BaseModel, route: Route, steps: int
) -> None:
    options = {"timestep_spacing": "trailing"}
    if route == DDIM:
        scheduler: Any = DDIMScheduler.from_config(model.pipeline.scheduler.config, set_alpha_to_one=True, **options)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(model.pipeline.scheduler.config, **options)
    scheduler.wanted_steps = steps
    noise = torch.randn(2, 4, 16, 16)
    expected = stock_sample(model, scheduler, noise, 3.0)
    condition, negative = (model.encode_prompts(p)["encoder_hidden_states"] for p in (PROMPTS, ["", ""]))
    velocity = unet_velocity(model.unet, model.alignment, condition, negative, 3.0)
    with torch.no_grad():
        got = draw_latents(velocity, noise, route, steps, model.alignment, model.pipeline.scheduler)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("naive", [False, True])
def test_every_route_takes_one_network_to_its_data_whatever_it_was_trained_on(route: Route, naive: bool) -> None:
    """The ideal velocity towards one picture is constant along the path: each sampler must end in it."""
    base = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    reader = NaiveFlow() if naive else Alignment.from_scheduler(base)
    target, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    seen = []

    def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t))
        return (target - x_t) / (1 - t)

    latents = draw_latents(velocity, noise, route, 4, reader, base)
    torch.testing.assert_close(latents, target, rtol=1e-3, atol=1e-3)
    assert len(seen) == 4
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    starts_at_zero = route.sampler == "flow"
    expected = 0.001 if route == DPM and naive else 0.0 if starts_at_zero else Alignment.from_scheduler(base).t_min
    assert seen[0] == pytest.approx(expected, abs=1e-4)


def test_two_steps_of_dpm_solver_are_ddim(model: BaseModel) -> None:
    painter = Painter(model, model.alignment, guidance_scale=2.0)
    drawn = [painter.draw(PROMPTS, noise_of(2, model, 0), route, 2) for route in (DDIM, DPM)]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-4)
    longer = [painter.draw(PROMPTS, noise_of(2, model, 0), route, 4) for route in (DDIM, DPM)]
    assert (longer[1] - longer[0]).abs().max() > 1e-3


def test_painter_draws_the_same_in_batches(model: BaseModel) -> None:
    counted: list[int] = []
    noise = noise_of(2, model, 0)
    whole = Painter(model, model.alignment, 2.0).draw(PROMPTS, noise, FLOW, 2)
    parts = Painter(model, model.alignment, 2.0, batch=1, on_batch=counted.append).draw(PROMPTS, noise, FLOW, 2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert counted == [2, 2]
    assert whole.abs().max() <= 1


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [1, 2]), (8, [4, 4]), (17, [4, 4, 4, 5])])
def test_painter_gives_each_thread_as_much(model: BaseModel, count: int, expected: list[int]) -> None:
    counted: list[int] = []
    painter = Painter(model, model.alignment, 2.0, batch=5, on_batch=counted.append)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        drawn = painter.draw(["a cat on a red background"] * count, noise_of(count, model, 0), FLOW, 1)
    finally:
        torch.set_num_threads(threads)
    assert sorted(counted) == expected and len(drawn) == count
