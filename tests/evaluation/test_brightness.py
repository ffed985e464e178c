"""Test the grey bias against closed forms and diffusers' DDIM."""

import pytest
import torch
from diffusers import DDIMScheduler

from d2f_fast.evaluation.brightness import gaussian_grey_bias, grey_bias
from d2f_fast.flow.alignment import Alignment

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_grey_bias_is_the_ratio_of_the_brightness_spreads() -> None:
    generator = torch.Generator().manual_seed(0)
    brightness = torch.randn(1000, 1, 1, 1, generator=generator)
    real = brightness + torch.zeros(1000, 3, 4, 4)
    result = grey_bias(0.5 * real + 0.2, real)
    assert result.value == pytest.approx(0.5, rel=1e-6)
    assert 0.45 < result.low < 0.5 < result.high < 0.55


@pytest.mark.parametrize(
    ("shape", "variance", "steps", "kept"),
    [
        ((4, 64, 64), 64, 4, 0.72),
        ((4, 64, 64), 64, 25, 1.02),
        ((4, 64, 64), 1000, 4, 0.47),
        ((4, 8, 8), 1000, 25, 0.79),
    ],
)
def test_gaussian_grey_bias_equals_known_values_with_equal_steps(
    shape: tuple[int, ...], variance: float, steps: int, kept: float
) -> None:
    alignment = Alignment.from_scheduler(DDIMScheduler(**SCHEDULE))
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    assert gaussian_grey_bias(alignment, shape, variance / (shape[1] * shape[2]), times) == pytest.approx(
        kept, abs=5e-3
    )


@pytest.mark.parametrize("start", ["zero", "table"])
def test_gaussian_grey_bias_depends_on_size_but_not_on_prediction_type(start: str) -> None:
    kept = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        alignment = Alignment.from_scheduler(DDIMScheduler(**SCHEDULE, prediction_type=prediction_type))
        times = alignment.times(8).double()
        times[0] = 0 if start == "zero" else alignment.t_min
        kept.append([gaussian_grey_bias(alignment, (4, side, side), 1.0, times) for side in (8, 64)])
    assert kept[1] == pytest.approx(kept[0], rel=1e-9)
    assert kept[2] == pytest.approx(kept[0], rel=1e-9)
    assert kept[0][1] < kept[0][0] - 0.05


def test_gaussian_grey_bias_equals_ddim_with_the_ideal_network() -> None:
    """The stock sampler is linear too, so that its result for an input of 1 is its factor on the deviation."""
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(4)
    alignment, data = Alignment.from_scheduler(scheduler), 64.0
    times = alignment.times(4, "trailing").double()
    times[0] = alignment.t_min
    sample = torch.ones((), dtype=torch.float64)
    for timestep in scheduler.timesteps:
        signal = scheduler.alphas_cumprod[timestep].double()
        noise = (1 - signal).sqrt() / (signal * data + 1 - signal) * sample
        sample = scheduler.step(noise, timestep, sample).prev_sample
    expected = gaussian_grey_bias(alignment, (1, 1, 1), data, times)
    assert sample.item() / data**0.5 == pytest.approx(expected, rel=1e-5)
