"""The measures against scipy and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers import DDIMScheduler

from d2f_fast.evaluation.accuracy import background_accuracy, name_accuracy
from d2f_fast.evaluation.brightness import gaussian_grey_bias, grey_bias
from d2f_fast.evaluation.distances import bootstrap_interval, frechet_distance, real_floor
from d2f_fast.flow.alignment import Alignment

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def with_moments(mean: np.ndarray, deviation: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Samples whose own mean and covariance are exactly `mean` and diag(deviation²)."""
    drawn = generator.standard_normal((count, len(mean)))
    drawn -= drawn.mean(0)
    values, vectors = np.linalg.eigh(np.cov(drawn, rowvar=False))
    return mean + deviation * (drawn @ vectors / np.sqrt(values))


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    means, deviations = generator.standard_normal((2, 5)), generator.random((2, 5)) + 0.1
    a, b = (with_moments(m, s, 200, generator) for m, s in zip(means, deviations, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(100, 70, 8), (20, 300, 64), (2, 3, 1)])
def test_frechet_distance_equals_scipys_square_root(n: int, m: int, d: int) -> None:
    generator = np.random.default_rng(1)
    a = generator.standard_normal((n, d)) @ generator.standard_normal((d, d))
    b = generator.standard_normal((m, d)) + 0.3
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root).real
    # Of fewer samples than features the product is singular, and scipy's root is exact to sqrt(eps) only.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if n < d else 1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_the_order_does_not_matter() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((50, 6)), 2 * generator.standard_normal((60, 6))
    assert abs(frechet_distance(a, a)) < 1e-12
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (6,)])
def test_features_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(np.ones((5, 3)), np.ones(shape))


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered, halves = 0, []
    for i in range(200):
        interval = bootstrap_interval(lambda x: float(x.mean()), generator.standard_normal(100), repeats=200, seed=i)
        covered += interval.low <= 0 <= interval.high
        halves.append((interval.high - interval.low) / 2)
    assert 180 <= covered <= 199
    assert np.mean(halves) == pytest.approx(1.96 / 10, rel=0.05)


def test_bootstrap_interval_holds_a_frechet_distance_in_spite_of_its_bias() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal((60, 32)), generator.standard_normal((60, 32))
    interval = bootstrap_interval(frechet_distance, a, b, repeats=50)
    resampled = frechet_distance(a[generator.integers(60, size=60)], b[generator.integers(60, size=60)])
    assert resampled > interval.high  # the bias that the interval must not inherit
    assert interval.low < interval.value == frechet_distance(a, b) < interval.high


def test_real_floor_falls_with_the_count_and_is_far_below_a_real_difference() -> None:
    features = np.random.default_rng(5).standard_normal((2000, 8))
    few, many = real_floor(features, 50), real_floor(features, 1000)
    assert 0 < many < few < frechet_distance(features, features + 1)
    assert real_floor(features, 50, against=50) > few
    with pytest.raises(ValueError, match="1500 and 501 pictures need 2001 features, got 2000"):
        real_floor(features, 1500, against=501)


def test_background_is_read_from_the_corners_where_they_are_free() -> None:
    palette = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1]])
    colours = torch.tensor([0, 1, 2, 0])
    pictures = palette[colours][:, :, None, None].repeat(1, 1, 8, 8) + 0.1 * torch.randn(4, 3, 8, 8)
    pictures[..., 2:-2, 2:-2] = 0.9  # what is drawn
    pictures[3] = 1.0
    assert background_accuracy(pictures, colours, palette, torch.tensor([True, True, True, True])) == (0.75, 4)
    assert background_accuracy(pictures, colours, palette, torch.tensor([True, True, True, False])) == (1.0, 3)


def test_name_accuracy_counts_the_first_guesses() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]])
    names = torch.tensor([0, 1, 3, 3])
    assert name_accuracy(logits, names) == 0.5
    assert name_accuracy(logits, names, top=2) == 0.75


def test_grey_bias_is_the_ratio_of_the_spreads_of_brightness() -> None:
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
def test_gaussian_oracle_gives_the_known_figures_on_equal_steps(
    shape: tuple[int, ...], variance: float, steps: int, kept: float
) -> None:
    alignment = Alignment.from_scheduler(DDIMScheduler(**SCHEDULE))
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    assert gaussian_grey_bias(alignment, shape, variance / (shape[1] * shape[2]), times) == pytest.approx(
        kept, abs=5e-3
    )


@pytest.mark.parametrize("start", ["zero", "table"])
def test_gaussian_oracle_is_the_same_for_every_prediction_type_and_grows_with_size(start: str) -> None:
    kept = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        alignment = Alignment.from_scheduler(DDIMScheduler(**SCHEDULE, prediction_type=prediction_type))
        times = alignment.times(8).double()
        times[0] = 0 if start == "zero" else alignment.t_min
        kept.append([gaussian_grey_bias(alignment, (4, side, side), 1.0, times) for side in (8, 64)])
    assert kept[1] == pytest.approx(kept[0], rel=1e-9)
    assert kept[2] == pytest.approx(kept[0], rel=1e-9)
    assert kept[0][1] < kept[0][0] - 0.05


def test_gaussian_oracle_equals_ddim_with_the_ideal_network() -> None:
    """The stock sampler is linear too: what it makes of 1 is the factor on the deviation."""
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
