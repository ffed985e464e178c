"""Measure, by nearest neighbours among features, which real images a set of generated ones covers."""

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

_ROWS = 1024  # distances of so many images at a time are held in memory


@dataclass(frozen=True)
class Neighbourhoods:
    """Fractions of images that lie near enough to the other set, each from 0 to 1.

    An image's ball reaches to its k-th nearest neighbour in its own set.

    Args:
        precision: fraction of the generated images within the ball of a real one (Kynkäänniemi et al.,
            arXiv 1904.06991).
        recall: fraction of the real images within the ball of a generated one, by the same authors.
        coverage: fraction of the real images whose ball holds a generated one (Naeem et al., arXiv 2002.09797).
    """

    precision: float
    recall: float
    coverage: float


def compare_neighbourhoods(real: ArrayLike, generated: ArrayLike, k: int = 5) -> Neighbourhoods:
    """Compute precision, recall and coverage of generated images.

    Compare them for equal numbers of images only, because balls shrink as images become more.

    Args:
        real: features [n, d] of real images.
        generated: features [m, d] of generated images.
        k: which neighbour a ball reaches to, at least 1 and less than n and m.

    Raises:
        ValueError: The shapes do not agree, or there are no more than `k` images in a set.
    """
    a, b = (torch.as_tensor(features, dtype=torch.float64) for features in (real, generated))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] and [m, d], got {list(a.shape)} and {list(b.shape)}")
    if not 1 <= k < min(len(a), len(b)):
        raise ValueError(f"k must be at least 1 and below the number of images, got {k} for {len(a)} and {len(b)}")
    of_real, of_generated = _radii(a, k), _radii(b, k)
    recalled, covered = [], []
    held = torch.zeros(len(b), dtype=torch.bool)
    for rows, radii in zip(a.split(_ROWS), of_real.split(_ROWS), strict=True):
        distances = torch.cdist(rows, b)
        recalled.append((distances <= of_generated).any(1))
        inside = distances <= radii[:, None]
        covered.append(inside.any(1))
        held |= inside.any(0)
    return Neighbourhoods(_fraction(held), _fraction(torch.cat(recalled)), _fraction(torch.cat(covered)))


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each image to its k-th nearest neighbour in the same set, [n]."""
    # The nearest of all is the image itself.
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1).values for rows in features.split(_ROWS)])


def _fraction(flags: Tensor) -> float:
    """Return the fraction of flags that are set."""
    return float(flags.double().mean())
