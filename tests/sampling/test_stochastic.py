"""`sample_flow_stochastic` against the closed form of Gaussian data."""

import itertools
import math

import pytest
import torch

from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.stochastic import sample_flow_stochastic

MEAN, DEVIATION = 1.5, 0.4


def spread(t):
    """Return the variance of x_t = t x_1 + (1 - t) noise for data from N(MEAN, DEVIATION²)."""
    return (t * DEVIATION) ** 2 + (1 - t) ** 2


def gaussian(x, t):
    """Return the flow's velocity E[x_1 - noise | x_t = x]."""
    return MEAN + (t * DEVIATION**2 - (1 - t)) * (x - t * MEAN) / spread(t)


def evolved(times, diffusion, method):
    """Return the exact mean and variance of the discretised process, whose steps are affine in the state.

    A step is measured at two states without its random part; the random part of the second stage is scaled as there.
    """
    mean, variance = 0.0, 1.0
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        noise = diffusion * ((1 - t) ** 2 - (1 - t_next) ** 2)
        if t_next == 1:
            noise, diffusion = 0.0, 0.0

        def drift(x, at, diffusion=diffusion):
            return gaussian(x, at) - diffusion * (x - at * gaussian(x, at))

        def step(x, random, drift=drift, t=t, t_next=t_next, h=h):
            slope = drift(x, t)
            if method == "stochastic_heun" and t_next < 1:
                slope = (slope + drift(x + h * slope + random, t_next)) / 2
            return x + h * slope + random

        offset = step(0.0, 0.0)
        growth, of_noise = step(1.0, 0.0) - offset, step(0.0, 1.0) - offset
        mean, variance = growth * mean + offset, growth**2 * variance + of_noise**2 * noise
    return mean, variance


@pytest.mark.parametrize("method", ["euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("diffusion", [0.5, 2.0])
def test_marginals_of_gaussian_data_hold_within_three_standard_errors(method, diffusion):
    count, steps = 20_000, 200
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(count, dtype=torch.float64, generator=generator)
    states = sample_flow_stochastic(
        gaussian, start, steps, method=method, diffusion=diffusion, generator=generator, return_intermediates=True
    )
    for k in (50, 100, 150, 200):
        t = k / steps
        variance = spread(t)
        assert abs(states[k].mean() - t * MEAN) <= 3 * math.sqrt(variance / count)
        assert abs(states[k].var() - variance) <= 3 * variance * math.sqrt(2 / count)


@pytest.mark.parametrize(("method", "order"), [("euler_maruyama", 1), ("stochastic_heun", 2)])
def test_error_of_the_moments_falls_with_the_order_of_the_method(method, order):
    errors = []
    for steps in (20, 40, 80):
        mean, variance = evolved([0.8 * k / steps for k in range(steps + 1)], 1.0, method)
        errors.append((abs(mean - 0.8 * MEAN), abs(variance - spread(0.8))))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse[1] / fine[1]) == pytest.approx(order, abs=0.35)
        assert fine[0] <= coarse[0] / 2**order * 1.3 + 1e-12


@pytest.mark.parametrize("method", ["euler_maruyama", "stochastic_heun"])
def test_samples_have_the_exact_moments_of_the_discretised_process(method):
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(200_000, dtype=torch.float64, generator=generator)
    got = sample_flow_stochastic(gaussian, start, 5, method=method, generator=generator)
    mean, variance = evolved([k / 5 for k in range(6)], 1.0, method)
    assert abs(got.mean() - mean) <= 4 * math.sqrt(variance / 200_000)
    assert abs(got.var() - variance) <= 4 * variance * math.sqrt(2 / 200_000)
    assert abs(variance - spread(1.0)) > 10 * variance * math.sqrt(2 / 200_000)  # The steps are coarse enough to tell.


@pytest.mark.parametrize(("method", "fixed"), [("euler_maruyama", "euler"), ("stochastic_heun", "heun")])
def test_no_diffusion_is_the_flow_itself(method, fixed):
    start, times = torch.randn(3, 4), torch.linspace(0, 0.9, 5)
    got = sample_flow_stochastic(gaussian, start, times=times, method=method, diffusion=0.0)
    assert torch.allclose(got, sample_flow(gaussian, start, times=times, method=fixed))


@pytest.mark.parametrize(("method", "evaluations"), [("euler_maruyama", 4), ("stochastic_heun", 7)])
def test_velocity_is_evaluated_once_a_step_or_twice(method, evaluations):
    seen = []

    def velocity(x, t):
        seen.append((t.ndim, t.dtype))
        return gaussian(x.float(), t)

    state = sample_flow_stochastic(velocity, torch.randn(2, 3).half(), 4, method=method)
    assert seen == [(0, torch.float32)] * evaluations and state.dtype == torch.float16


def test_seed_decides_the_result():
    start = torch.randn(2, 3)
    results = [
        sample_flow_stochastic(gaussian, start, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "heun"}, "method must be one of"),
        ({"diffusion": -1.0}, "diffusion must not be negative"),
        ({"times": torch.tensor([1.0, 0.0])}, "noise cannot be taken back"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_unusable_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample_flow_stochastic(gaussian, torch.zeros(1), **options)
