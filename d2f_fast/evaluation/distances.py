"""Measure Fréchet distances between sets of features, with bootstrap intervals and the real images' own distance.

A Fréchet distance depends on the number of images behind it: compare distances of equal counts only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its bootstrap interval.

    Args:
        value: the estimate.
        low, high: lower and upper bound; low <= value <= high.
    """

    value: float
    low: float
    high: float


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to two sets of features, in float64.

        |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½)      Heusel et al., arXiv 1706.08500, equation 6

    The covariances divide by n - 1. The symmetric product has the same eigenvalues as C_a C_b, and they are real.

    Args:
        a, b: features [n, d] and [m, d], at least two rows each.

    Returns:
        The squared distance, as FID is usually given; 0 or more but for rounding.

    Raises:
        ValueError: The shapes are other ones.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [n, d] and [m, d] with n, m >= 2, got {a.shape} and {b.shape}")
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(covariance_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariance_b @ root)
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(product.clip(min=0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread)


def bootstrap_deviations(statistic: Callable[..., float], *samples: ArrayLike, repeats: int, seed: int) -> Array:
    """Resample samples, and return the deviations [repeats] of a statistic from the bootstrap's own mean.

    Resampling repeats rows, which shifts a Fréchet distance upwards; that shift is a bias of the bootstrap, and says
    nothing about the statistic's uncertainty.

    Args:
        statistic: function of as many arrays as there are samples, which returns a number.
        samples: arrays that are resampled along their first axis, independently of each other.
        repeats: number of resamplings.
        seed: seed of the resampling. Samples of equal lengths are resampled alike with equal seeds.
    """
    generator = np.random.default_rng(seed)
    arrays = [np.asarray(sample) for sample in samples]
    resampled = np.array(
        [
            statistic(*(array[generator.integers(len(array), size=len(array))] for array in arrays))
            for _ in range(repeats)
        ]
    )
    return np.asarray(resampled - resampled.mean())


def bootstrap_interval(
    statistic: Callable[..., float], *samples: ArrayLike, repeats: int = 100, seed: int = 0, level: float = 0.95
) -> Interval:
    """Compute a statistic of samples, with an interval from the quantiles of its bootstrap deviations.

    Args:
        statistic: function of as many arrays as there are samples, which returns a number.
        samples: arrays that are resampled along their first axis, independently of each other.
        repeats: number of resamplings.
        seed: seed of the resampling.
        level: fraction of the deviations within the interval, in (0, 1).
    """
    deviations = bootstrap_deviations(statistic, *samples, repeats=repeats, seed=seed)
    value = statistic(*map(np.asarray, samples))
    low, high = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(value + min(low, 0)), float(value + max(high, 0)))


def real_floor(features: ArrayLike, count: int, against: int | None = None, splits: int = 20, seed: int = 0) -> float:
    """Compute the mean Fréchet distance of real images to other real ones, over random splits.

    Generated images cannot be expected to come closer to real ones than this.

    Args:
        features: features [n, d] of real images.
        count: number of images on one side of a split; give the number of generated images to compare with.
        against: number of images on the other side; None takes all that are left.
        splits: number of random splits.
        seed: seed of the splits.

    Raises:
        ValueError: A side has fewer than two images, or both together need more than there are.
    """
    features = np.asarray(features, np.float64)
    end = len(features) if against is None else count + against
    if end > len(features):
        raise ValueError(f"{count} and {against} images need {end} features, got {len(features)}")
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(splits):
        order = generator.permutation(len(features))
        distances.append(frechet_distance(features[order[:count]], features[order[count:end]]))
    return float(np.mean(distances))
