"""Compare numbers with N(0, 1) by their moments, which are added up without keeping the numbers."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

# The moments of noise may differ from those of N(0, 1) by this many of their standard errors.
MOST_STANDARD_ERRORS = 6.0
# The kurtosis of fewer numbers is far from normally distributed: of 256, one in 8,000 exceeds six standard errors.
LEAST_FOR_KURTOSIS = 4096


@dataclass
class Moments:
    """Add up the first four moments of numbers.

    Attributes:
        count: Number of numbers.
        sums: Sums of their first, second, third and fourth powers.
    """

    count: int = 0
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))

    def add(self, numbers: Array) -> None:
        """Add the numbers of an array of any shape."""
        flat = numbers.astype(np.float64).ravel()
        self.count += flat.size
        with np.errstate(all="ignore"):  # What overflows is told from normal numbers below.
            self.sums += [flat.sum(), (flat**2).sum(), (flat**3).sum(), (flat**4).sum()]

    @property
    def deviation(self) -> float:
        """Return the standard deviation."""
        with np.errstate(all="ignore"):
            first, second = self.sums[:2] / self.count
            return math.sqrt(max(float(second - first**2), 0.0))

    def difference_from_normal(self) -> str | None:
        """Return how the numbers differ from N(0, 1), or None if chance explains the difference.

        The standard errors of the mean, the deviation and the kurtosis of n numbers from N(0, 1) are 1 / sqrt(n),
        1 / sqrt(2 n) and sqrt(24 / n). The kurtosis of fewer than 4096 numbers is not compared.
        """
        if not np.isfinite(self.sums).all():
            return "it holds NaN, infinity, or numbers that are far too large"
        first, second, third, fourth = self.sums / self.count
        if not self.deviation > 0:
            return "all of its numbers are equal"
        variance = second - first**2
        with np.errstate(all="ignore"):
            kurtosis = (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2
        errors = (1 / math.sqrt(self.count), 1 / math.sqrt(2 * self.count), math.sqrt(24 / self.count))
        found = [("mean", first, 0.0), ("deviation", math.sqrt(variance), 1.0), ("kurtosis", kurtosis, 3.0)]
        for (name, value, expected), error in zip(found, errors, strict=True):
            if name == "kurtosis" and self.count < LEAST_FOR_KURTOSIS:
                return None
            if not abs(value - expected) <= MOST_STANDARD_ERRORS * error:
                return f"its {name} is {value:.4g} and not {expected:g}"
        return None
