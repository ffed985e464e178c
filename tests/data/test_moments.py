"""Moments of numbers, and their differences from those of N(0, 1)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from d2f_fast.data.moments import MOST_STANDARD_ERRORS, Moments


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda z: z + 0.03, "mean"),
        (lambda z: z * 0.98, "deviation"),
        (lambda z: np.sign(z), "kurtosis"),
        (lambda z: z * 0, "equal"),
        (lambda z: np.where(z > 4, np.inf, z), "infinity"),
        (lambda z: np.where(z > 4, np.nan, z), "NaN"),
        (lambda z: z * 1e100, "far too large"),
        (lambda z: z * 1e-100, "deviation"),
    ],
)
def test_moments_notice_numbers_that_are_not_standard_normal(change: Callable[[Any], Any], name: str) -> None:
    numbers = np.random.default_rng(1).standard_normal(100_000)
    good, bad = Moments(), Moments()
    for part in np.split(numbers, 10):
        good.add(part)
        bad.add(change(part))
    assert good.difference_from_normal() is None and abs(good.deviation - numbers.std()) < 1e-12
    assert name in str(bad.difference_from_normal())


def test_few_normal_numbers_are_not_refused_for_their_kurtosis() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((20_000, 64))
    fourth = ((numbers - numbers.mean(1, keepdims=True)) ** 4).mean(1) / numbers.var(1) ** 2
    moments = Moments()
    moments.add(numbers[fourth.argmax()])
    assert fourth.max() > 3 + MOST_STANDARD_ERRORS * (24 / 64) ** 0.5 and moments.difference_from_normal() is None


def test_bounds_of_the_moments_follow_the_number_of_samples() -> None:
    for count in (400, 40_000):
        numbers = np.random.default_rng(2).standard_normal(count)
        numbers = (numbers - numbers.mean()) / numbers.std()
        for factor, expected in ((0.9, True), (1.1, False)):
            moments = Moments()
            moments.add(numbers + factor * MOST_STANDARD_ERRORS / count**0.5)
            assert (moments.difference_from_normal() is None) == expected
