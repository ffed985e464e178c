"""DPM-Solver++ along flow time, compared with diffusers' and with the exact solution of a Gaussian."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.multistep import sample_multistep


def nonlinear(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x_t + t) - x_t * t


def gaussian(deviation: float) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the velocity of data from N(0, deviation²), and the exact end of the path of a noise."""

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        return x_t * (t * deviation**2 - (1 - t)) / (t**2 * deviation**2 + (1 - t) ** 2)

    return velocity, lambda noise: deviation * noise


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_states_are_those_of_diffusers(steps: int) -> None:
    stock = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero", euler_at_final=True
    )
    stock.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    times = 1 - stock.sigmas.double()
    assert times[0] > 0 and times[-1] == 1
    expected = noise
    for i, timestep in enumerate(stock.timesteps):
        # diffusers' flow models learn noise - latents.
        expected = stock.step(-nonlinear(expected, times[i]), timestep, expected, return_dict=False)[0]
    got = sample_multistep(nonlinear, noise, times)
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("deviation", [0.3, 1.0, 4.0])
def test_error_from_pure_noise_falls_with_the_square_of_the_step(deviation: float) -> None:
    velocity, exact = gaussian(deviation)
    noise = torch.randn(16, dtype=torch.float64)
    errors = {}
    for steps in (80, 320):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        errors[steps] = (sample_multistep(velocity, noise, times) - exact(noise)).norm()
        assert errors[steps] < 0.2 * (sample_flow(velocity, noise, times=times) - exact(noise)).norm()
    assert errors[80] / errors[320] > 8


def test_one_step_from_noise_is_one_euler_step() -> None:
    noise = torch.randn(3, 4, 8, 8)
    assert torch.allclose(
        sample_multistep(nonlinear, noise, torch.tensor([0.0, 1.0])), sample_flow(nonlinear, noise, 1)
    )


def test_state_keeps_its_type() -> None:
    assert sample_multistep(nonlinear, torch.zeros(1).half(), torch.linspace(0, 1, 3)).dtype == torch.float16


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0], [0.5, 0.2], [-0.1, 1.0], [0.0, 1.1]])
def test_times_that_do_not_rise_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="times must rise from 0 or later to 1 or earlier"):
        sample_multistep(nonlinear, torch.zeros(1), torch.tensor(times))
