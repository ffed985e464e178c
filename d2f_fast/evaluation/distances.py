"""Judge sets of pictures: distance to real ones, accuracy of background and name, brightness spread; with intervals.

Every figure depends on how many pictures it was computed from: compare figures of equal counts.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from d2f_fast.flow.alignment import Alignment

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


def corner_pixels(pictures: Tensor, side: int = 2) -> Tensor:
    """The four corners, `side` pixels along each side: [B, C, 4 * side²] of pictures [B, C, H, W]."""
    ends = torch.cat([torch.arange(side), torch.arange(-side, 0)])
    return pictures[..., ends, :][..., ends].flatten(2)


def corner_colours(pictures: Tensor, palette: Tensor, side: int = 2) -> Tensor:
    """Index of the palette's colour nearest to the median of the four corners, [B].

    Args:
        pictures: [B, C, H, W].
        palette: [colours, C], in the same units.
        side: pixels of a corner along each side.
    """
    return torch.cdist(corner_pixels(pictures, side).median(dim=-1).values, palette).argmin(dim=-1)


def background_accuracy(pictures: Tensor, colours: Tensor, palette: Tensor, readable: Tensor) -> tuple[float, int]:
    """Share of the pictures whose corners are of the captioned colour, and how many were read.

    Args:
        pictures: [B, C, H, W].
        colours: [B], index into the palette.
        palette: [colours, C].
        readable: [B] bool, false where what is drawn covers a corner.
    """
    right = (corner_colours(pictures, palette) == colours)[readable]
    return (right.double().mean().item() if len(right) else float("nan")), len(right)


def name_accuracy(logits: Tensor, names: Tensor, top: int = 1) -> float:
    """Share of the pictures whose name is among the classifier's first `top`; logits [B, names], names [B]."""
    return (logits.topk(top, dim=-1).indices == names[:, None]).any(-1).double().mean().item()


def mean_brightness(pictures: Tensor) -> Array:
    """Mean over channels and pixels of each picture, [B]."""
    return pictures.double().flatten(1).mean(1).cpu().numpy()


def grey_bias(pictures: Tensor, real: Tensor, repeats: int = 1000, seed: int = 0) -> Interval:
    """Spread of the mean brightness of pictures as a share of the real ones': 1 is none, below 1 is grey.

    Args:
        pictures, real: [B, C, H, W] and [R, C, H, W], drawn from the same captions, in the same units.
        repeats: of the bootstrap, which resamples both.
        seed: of the bootstrap.
    """
    return bootstrap_interval(
        lambda drawn, wanted: float(drawn.std(ddof=1) / wanted.std(ddof=1)),
        mean_brightness(pictures),
        mean_brightness(real),
        repeats=repeats,
        seed=seed,
    )


def gaussian_grey_bias(alignment: Alignment, shape: tuple[int, ...], variance: float, times: Tensor) -> float:
    """Share of the brightness spread that a perfect network keeps for Gaussian data: closed form, nothing is drawn.

    The latents are N(0, Σ), and the mean of each channel has variance `variance`. Along that one direction the ideal
    network and Euler's method are linear maps of a number, so its variance is propagated exactly. The direction's own
    variance is height * width * variance, which is why the effect grows with the size of the latents.

    Args:
        alignment: of the schedule and the prediction type.
        shape: (channels, height, width) of the latents.
        variance: of a channel's mean over the picture.
        times: [steps + 1] flow times; at times[0] the diffusion state is drawn from N(0, 1), as samplers do.
    """
    data = variance * shape[-1] * shape[-2]
    times = times.double()
    x_t = alignment.state_scale(times[0])
    for t, t_next in itertools.pairwise(times):
        # The ideal network reads the state it is given at the noise level it is told, which is the clipped one.
        alpha, sigma = alignment.coefficients(t)
        p, q = alignment.velocity_coefficients(t)
        sample = x_t / alignment.state_scale(t)
        latents = alpha * data / (alpha.square() * data + sigma.square()) * sample
        noise = sigma / (alpha.square() * data + sigma.square()) * sample
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
        x_t = x_t + (t_next - t) * (p * sample + q * output[alignment.prediction_type])
    return (x_t.abs() / data**0.5).item()
