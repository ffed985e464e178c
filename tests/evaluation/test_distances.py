"""Test distances and intervals against scipy and closed forms."""

import numpy as np
import pytest
import scipy.linalg

from d2f_fast.evaluation.distances import bootstrap_interval, frechet_distance, real_floor


def with_moments(mean: np.ndarray, deviation: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return samples whose own mean and covariance are exactly `mean` and diag(deviation²)."""
    samples = generator.standard_normal((count, len(mean)))
    samples -= samples.mean(0)
    values, vectors = np.linalg.eigh(np.cov(samples, rowvar=False))
    return mean + deviation * (samples @ vectors / np.sqrt(values))


def test_frechet_distance_of_diagonal_gaussians_equals_the_closed_form() -> None:
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
    # With fewer samples than features the product is singular, and scipy's root is exact to sqrt(eps) only.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if n < d else 1e-10)


def test_frechet_distance_is_zero_for_equal_sets_and_symmetric() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((50, 6)), 2 * generator.standard_normal((60, 6))
    assert abs(frechet_distance(a, a)) < 1e-12
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (6,)])
def test_features_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(np.ones((5, 3)), np.ones(shape))


def test_bootstrap_interval_covers_the_true_mean_at_its_level() -> None:
    generator = np.random.default_rng(3)
    covered, halves = 0, []
    for i in range(200):
        interval = bootstrap_interval(lambda x: float(x.mean()), generator.standard_normal(100), repeats=200, seed=i)
        covered += interval.low <= 0 <= interval.high
        halves.append((interval.high - interval.low) / 2)
    assert 180 <= covered <= 199
    assert np.mean(halves) == pytest.approx(1.96 / 10, rel=0.05)


def test_bootstrap_interval_excludes_the_bias_of_resampled_distances() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal((60, 32)), generator.standard_normal((60, 32))
    interval = bootstrap_interval(frechet_distance, a, b, repeats=50)
    resampled = frechet_distance(a[generator.integers(60, size=60)], b[generator.integers(60, size=60)])
    assert resampled > interval.high  # The interval must not inherit this bias.
    assert interval.low < interval.value == frechet_distance(a, b) < interval.high


def test_real_floor_falls_with_the_count_and_is_below_a_true_difference() -> None:
    features = np.random.default_rng(5).standard_normal((2000, 8))
    few, many = real_floor(features, 50), real_floor(features, 1000)
    assert 0 < many < few < frechet_distance(features, features + 1)
    assert real_floor(features, 50, against=50) > few
    with pytest.raises(ValueError, match="1500 and 501 images need 2001 features, got 2000"):
        real_floor(features, 1500, against=501)
