"""Test the times of DDIM's steps against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler

from d2f_fast.demo.samplers import times_of_ddim
from d2f_fast.flow.alignment import Alignment
from d2f_fast.sampling.integrate import sample_flow

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_clean", [False, True])
def test_euler_at_the_times_of_ddim_gives_its_latents(spacing: str, to_clean: bool) -> None:
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing=spacing, set_alpha_to_one=to_clean, steps_offset=1)
    alignment, noise = Alignment.from_scheduler(scheduler), torch.randn(2, 4, 8, 8)

    def network(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(sample + timestep / 1000)

    times = times_of_ddim(scheduler, alignment, 5)
    expected = noise
    for timestep in scheduler.timesteps:
        expected = scheduler.step(network(expected, timestep), timestep, expected).prev_sample

    def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sample = alignment.to_sample(x_t, t)
        return alignment.velocity(network(sample, alignment.timestep(t)), sample, t)

    end = sample_flow(velocity, alignment.to_flow(noise, times[0]), times=times)
    assert isinstance(end, torch.Tensor)
    torch.testing.assert_close(alignment.to_sample(end, times[-1]), expected, rtol=1e-4, atol=1e-4)
    assert (times[-1] == 1) == to_clean
