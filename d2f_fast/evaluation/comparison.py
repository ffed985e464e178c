"""Compare generated images with real ones, beside the same comparison of real images with other real ones."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from d2f_fast.evaluation.distances import Interval, bootstrap_interval, frechet_distance, real_floor
from d2f_fast.evaluation.feature_space import principal_directions
from d2f_fast.evaluation.neighbours import Neighbourhoods, compare_neighbourhoods

NEIGHBOURS = 5
LEAST_IMAGES = NEIGHBOURS + 2


@dataclass(frozen=True)
class Comparison:
    """Distance and neighbourhoods of generated and of held-out real images to the same real images.

    Args:
        compared: number of generated images that were compared, and of real images that were held out.
        against: number of real images that both were compared with.
        distance: Fréchet distance of the generated images, with its 95 % interval.
        floor: mean Fréchet distance of as many real images to as many other real ones, over 20 random divisions.
        generated: precision, recall and coverage of the generated images.
        real: the same of the real images that were held out.
    """

    compared: int
    against: int
    distance: Interval
    floor: float
    generated: Neighbourhoods
    real: Neighbourhoods


def compare_images(real: ArrayLike, generated: ArrayLike, seed: int = 0, repeats: int = 100) -> Comparison:
    """Compare the features of generated images with those of real ones.

    The real images are divided at random. One part, as large as the number of generated images and at most half, is
    held out; the other part is what both are compared with. So all numbers of real images are those of equal counts.
    Where there are more generated images than real ones in the first part, a random part of them is compared.

    Args:
        real: features [n, d] of real images, at least 14.
        generated: features [m, d] of generated images, at least 7.
        seed: seed of the divisions and of the bootstrap.
        repeats: resamplings behind the interval of the distance.

    Raises:
        ValueError: The shapes do not agree, or there are too few images.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features must be [n, d] and [m, d], got {real.shape} and {generated.shape}")
    compared = min(len(generated), len(real) // 2)
    if compared < LEAST_IMAGES:
        raise ValueError(
            f"a comparison needs {LEAST_IMAGES} generated and {2 * LEAST_IMAGES} real images, got {len(generated)} and"
            f" {len(real)}"
        )
    directions = principal_directions(real)
    real, generated = real @ directions, generated @ directions
    random = np.random.default_rng(seed)
    order = random.permutation(len(real))
    held_out, reference = real[order[:compared]], real[order[compared:]]
    chosen = generated[random.permutation(len(generated))[:compared]]
    return Comparison(
        compared=compared,
        against=len(reference),
        distance=bootstrap_interval(frechet_distance, chosen, reference, repeats=repeats, seed=seed),
        floor=real_floor(real, compared, len(reference), seed=seed),
        generated=compare_neighbourhoods(reference, chosen, NEIGHBOURS),
        real=compare_neighbourhoods(reference, held_out, NEIGHBOURS),
    )
