"""`Diff2FlowScheduler` in runs that start late or end early, against diffusers' own schedulers and whole runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from d2f_fast.config import Method
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def dummy(sample: Tensor, timestep: Tensor) -> Tensor:
    return 0.3 * sample + 0.01 * torch.as_tensor(timestep, dtype=torch.float32).sin()


@pytest.mark.parametrize("kind", [float, torch.as_tensor, lambda timestep: torch.as_tensor(timestep).long().repeat(2)])
def test_late_start_without_a_begin_index_equals_ddim(kind: Callable[[Tensor], Tensor | float]) -> None:
    stock = DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    stock.set_timesteps(4)
    ours = Diff2FlowScheduler.from_config(stock.config)
    ours.set_timesteps(timesteps=[999, 749, 499, 249])
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    start = stock.add_noise(latents, noise, stock.timesteps[2:3])
    assert_close(ours.add_noise(latents, noise, ours.timesteps[2:3]), start, 1e-6)
    expected = got = start
    for timestep in stock.timesteps[2:]:
        expected = stock.step(dummy(expected, timestep), timestep, expected).prev_sample
        got = ours.step(dummy(got, timestep), kind(timestep), got).prev_sample
    assert_close(got, expected, 2e-6)
    assert ours.step_index == 4 and ours.begin_index is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_late_start_equals_one_with_a_begin_index(method: Method, first: int, prediction_type: str) -> None:
    results = []
    for set_begin_index in (True, False):
        scheduler = Diff2FlowScheduler(**SD, method=method, prediction_type=prediction_type)
        scheduler.set_timesteps(4)
        begin = first * scheduler.order
        if set_begin_index:
            scheduler.set_begin_index(begin)
        latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        # At index 0 the state is pure noise, although the timestep of that node is 999.
        sample = scheduler.add_noise(latents, noise, scheduler.timesteps[begin : begin + 1].repeat(2))
        for timestep in scheduler.timesteps[begin:]:
            sample = scheduler.step(dummy(sample, timestep), timestep, sample).prev_sample
        results.append(sample)
    assert torch.equal(*results)


def test_first_timestep_outside_the_schedule_is_refused() -> None:
    scheduler, sample = Diff2FlowScheduler(**SD), torch.zeros(1, 4, 8, 8)
    scheduler.set_timesteps(timesteps=[800, 400])
    with pytest.raises(ValueError, match=r"timestep 600.0 is not in the schedule \[800.0, 400.0\]"):
        scheduler.step(sample, 600, sample)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("euler", torch.float32), ("midpoint", torch.float32), ("heun", torch.float32), ("heun", torch.bfloat16)],
    ids=str,
)
def test_divided_run_of_sdxl_equals_the_whole_one(tiny_xl: Any, method: Method, dtype: torch.dtype) -> None:
    """The two parts run in two pipelines, as the base and the refiner of SDXL do, each with a scheduler of its own."""
    tiny_xl.to(dtype)
    refiner = StableDiffusionXLImg2ImgPipeline(**tiny_xl.components, add_watermarker=False)
    tiny_xl.scheduler, refiner.scheduler = (
        Diff2FlowScheduler.from_config(tiny_xl.scheduler.config, method=method) for _ in range(2)
    )
    for pipeline in (tiny_xl, refiner):
        pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, dtype=dtype)
    calls = []
    tiny_xl.unet.register_forward_hook(lambda *_: calls.append(1))

    def images(pipeline: Any, steps: int, **options: Any) -> Tensor:
        calls.clear()
        return pipeline("ab", num_inference_steps=steps, guidance_scale=3.0, output_type="latent", **options).images

    for steps in (4, 5):
        whole = images(tiny_xl, steps, latents=noise)
        assert len(calls) == (steps if method == "euler" else 2 * steps - 1)
        for end in (0.3, 0.7):  # Of the midpoint steps two end here, and two are in the middle.
            part = images(tiny_xl, steps, latents=noise, denoising_end=end)
            assert torch.equal(images(refiner, steps, image=part, denoising_start=end), whole)
