"""Judge sets of pictures: distance to real ones, accuracy of background and name, brightness spread; with intervals.

Every figure depends on how many pictures it was computed from: compare figures of equal counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate, and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features, in float64.

    |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½), covariances with n - 1; Heusel et al.,
    arXiv 1706.08500, equation 6. The symmetric product has the eigenvalues of C_a C_b, and real ones.

    Args:
        a, b: [n, d] and [m, d], at least two rows each.

    Raises:
        ValueError: other shapes.
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


def bootstrap_interval(
    statistic: Callable[..., float], *samples: ArrayLike, repeats: int = 100, seed: int = 0, level: float = 0.95
) -> Interval:
    """Statistic of samples, with the quantiles of its bootstrap deviations around it.

    The deviations are taken from the bootstrap's own mean: resampling repeats rows, which shifts a Fréchet distance
    upwards, and that shift is no uncertainty.

    Args:
        statistic: maps the samples to a number.
        samples: resampled along their first axis, each on its own.
        repeats: resamplings.
        seed: of the resampling.
        level: share of the deviations within the interval.
    """
    generator = np.random.default_rng(seed)
    arrays = [np.asarray(sample) for sample in samples]
    drawn = np.array(
        [
            statistic(*(array[generator.integers(len(array), size=len(array))] for array in arrays))
            for _ in range(repeats)
        ]
    )
    value = statistic(*arrays)
    low, high = np.quantile(drawn - drawn.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(value + min(low, 0)), float(value + max(high, 0)))


def real_floor(features: ArrayLike, count: int, against: int | None = None, splits: int = 20, seed: int = 0) -> float:
    """Mean Fréchet distance of `count` real pictures to other real ones, over random splits.

    Args:
        features: [n, d] of the real pictures.
        count: pictures on one side of the split, as many as will be compared.
        against: pictures on the other side; None for all that are left.
        splits: random splits.
        seed: of the splits.

    Raises:
        ValueError: fewer than two pictures on a side, or more than there are.
    """
    features = np.asarray(features, np.float64)
    end = len(features) if against is None else count + against
    if end > len(features):
        raise ValueError(f"{count} and {against} pictures need {end} features, got {len(features)}")
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(splits):
        order = generator.permutation(len(features))
        distances.append(frechet_distance(features[order[:count]], features[order[count:end]]))
    return float(np.mean(distances))
