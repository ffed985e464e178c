"""Test the comparison of generated with real images against distances that are known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from d2f_fast.evaluation.comparison import LEAST_IMAGES, compare_images


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance by the textbook's formula."""
    first, second = np.cov(a.T), np.cov(b.T)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * np.real(sqrtm(first @ second))))


def test_distance_is_that_of_all_generated_images_to_the_real_ones_that_are_not_held_out() -> None:
    random = np.random.default_rng(0)
    real, generated = random.normal(size=(40, 3)), random.normal(size=(12, 3)) + 1
    found = compare_images(real, generated, seed=4, repeats=20)
    reference = real[np.random.default_rng(4).permutation(40)[12:]]
    assert (found.compared, found.against) == (12, 28)
    assert found.distance.value == pytest.approx(frechet(generated, reference), rel=1e-9)
    assert found.distance.low < found.distance.value < found.distance.high
    inside = [np.sort(np.linalg.norm(reference - x, axis=1))[5] for x in reference]
    covered = [
        np.linalg.norm(generated - x, axis=1).min() <= radius for x, radius in zip(reference, inside, strict=True)
    ]
    assert found.generated.coverage == pytest.approx(np.mean(covered))


def test_more_generated_images_than_half_of_the_real_ones_are_cut_to_equal_counts() -> None:
    random = np.random.default_rng(2)
    found = compare_images(random.normal(size=(401, 2)), random.normal(size=(900, 2)) + 3, repeats=10)
    assert (found.compared, found.against) == (200, 201)
    assert found.distance.value == pytest.approx(18, abs=2.6)  # three standard errors
    assert found.floor < 0.1
    assert found.generated.precision < 0.2 and min(found.real.precision, found.real.recall, found.real.coverage) > 0.9


def test_other_real_images_reach_the_floor() -> None:
    random = np.random.default_rng(2)
    found = compare_images(random.normal(size=(600, 4)), random.normal(size=(200, 4)), repeats=10)
    assert 0.2 * found.floor < found.distance.value < 3 * found.floor
    assert found.generated.coverage == pytest.approx(found.real.coverage, abs=0.05)


@pytest.mark.parametrize("sizes", [(13, 7), (14, 6)])
def test_too_few_images_are_refused(sizes: tuple[int, int]) -> None:
    real, generated = (np.random.default_rng(0).normal(size=(count, 2)) for count in sizes)
    with pytest.raises(ValueError, match=f"needs {LEAST_IMAGES} generated and 14 real images, got {sizes[1]} and"):
        compare_images(real, generated)
    assert compare_images(np.vstack([real, real]), np.vstack([generated, generated]), repeats=2).compared >= 7


def test_features_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="features must be"):
        compare_images(np.zeros((20, 3)), np.zeros((20, 4)))
