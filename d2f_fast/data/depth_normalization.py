"""Map the depth of an image to [-1, 1] and back, by two quantiles of its valid pixels.

    affine       y = d         -1 = the 2 % quantile, 1 = the 98 % quantile, clipped    Marigold, arXiv 2312.02145
    log          y = log d     -1 = the 1 % quantile, 1 = the 99 % quantile             the published Diff2Flow code
    disparity    y = 1 / d     -1 = the 2 % quantile, 1 = the 98 % quantile, clipped    Marigold's, of the disparity
    values       2 (y - y_low) / (y_high - y_low) - 1

Depth is the distance from the image plane along the optical axis. A network learns the values; without the two limits,
which only the true depth gives, they are known up to a scale and a shift of y.
"""

from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from d2f_fast.data.depth_options import DepthNormalization

_LOWER_QUANTILE: dict[DepthNormalization, float] = {"affine": 0.02, "log": 0.01, "disparity": 0.02}


class DepthLimits(NamedTuple):
    """The two depths, in metres, that are mapped to -1 and 1: near and far, for "disparity" far and near."""

    low: float
    high: float


def valid_pixels(depth: NDArray[np.floating], least: float = 0.0, most: float = np.inf) -> NDArray[np.bool_]:
    """Return which pixels have a depth that is finite, positive, and in a range.

    Args:
        depth: Depth in metres, of any shape.
        least: Smallest depth that counts, in metres.
        most: Largest depth that counts, in metres.
    """
    with np.errstate(invalid="ignore"):
        valid: NDArray[np.bool_] = np.isfinite(depth) & (depth > 0) & (depth >= least) & (depth <= most)
    return valid


def normalize_depth(
    depth: NDArray[np.floating], valid: NDArray[np.bool_], kind: DepthNormalization
) -> tuple[NDArray[np.float32], DepthLimits]:
    """Map depth to values in about [-1, 1].

    Invalid pixels get values that are interpolated between the valid ones before and after them, row by row, as in the
    published code: an autoencoder spreads each pixel over its surroundings. What they held has no influence.

    Args:
        depth: Depth in metres, [H, W].
        valid: Which pixels count, [H, W]; at least one of them. Their depth must be finite and positive.
        kind: Which normalisation. "affine" and "disparity" clip to [-1, 1]; "log" does not.

    Returns:
        Values, [H, W]; and the limits. Where both limits are equal, all values are 0.

    Raises:
        ValueError: There is no valid pixel, or the kind is unknown.
    """
    if kind not in get_args(DepthNormalization):
        raise ValueError(f"the normalisation must be one of {get_args(DepthNormalization)}, got {kind!r}")
    if not valid.any():
        raise ValueError("no pixel has a depth that is finite, positive and in range")
    known = depth[valid].astype(np.float64)
    lower = _LOWER_QUANTILE[kind]
    if kind == "disparity":
        low, high = 1 / np.quantile(1 / known, (lower, 1 - lower))
    else:
        low, high = np.quantile(known, (lower, 1 - lower))
    limits = DepthLimits(float(low), float(high))
    y_low, y_high = from_depth(np.array(limits), kind)
    span = y_high - y_low
    scaled = np.zeros_like(known) if span == 0 else 2 * (from_depth(known, kind) - y_low) / span - 1
    if kind != "log":
        scaled = scaled.clip(-1, 1)
    values = np.interp(np.arange(depth.size), np.flatnonzero(valid), scaled).reshape(depth.shape)
    return values.astype(np.float32), limits


def denormalize_depth(
    values: NDArray[np.floating], limits: DepthLimits, kind: DepthNormalization
) -> NDArray[np.float64]:
    """Return the depth, in metres, of normalised values: the inverse of `normalize_depth` where nothing is clipped.

    Args:
        values: Values, of any shape. Values of "disparity" far below -1, which lie beyond the horizon, become infinite.
        limits: Depths of the values -1 and 1, in metres.
        kind: Which normalisation.
    """
    y_low, y_high = from_depth(np.array(limits), kind)
    y = y_low + (np.asarray(values, np.float64) + 1) / 2 * (y_high - y_low)
    return to_depth(y, kind)


def to_depth(y: NDArray[np.float64], kind: DepthNormalization) -> NDArray[np.float64]:
    """Return the depth of the quantity that a normalisation is affine in: depth, its logarithm, or its inverse.

    Args:
        y: The quantity, of any shape.
        kind: Which normalisation. Of "disparity", 0 and negative values become infinite.
    """
    if kind == "affine":
        return y
    if kind == "log":
        return np.exp(y)
    with np.errstate(divide="ignore"):
        return np.where(y > 0, 1 / np.where(y > 0, y, 1), np.inf)


def from_depth(depth: NDArray[np.floating], kind: DepthNormalization) -> NDArray[np.float64]:
    """Return the quantity that a normalisation is affine in; see `to_depth`.

    Args:
        depth: Positive depth, of any shape.
        kind: Which normalisation.
    """
    known = np.asarray(depth, np.float64)
    if kind == "affine":
        return known
    return np.log(known) if kind == "log" else 1 / known


def valid_share(valid: NDArray[np.bool_], pixels_per_latent: int) -> NDArray[np.float32]:
    """Return the share of valid pixels of each latent, by which its loss is weighted.

    Args:
        valid: Which pixels are valid, [H, W]; both sides are multiples of `pixels_per_latent`.
        pixels_per_latent: Number of pixels along each side of one latent.

    Returns:
        Shares in [0, 1], [H / pixels_per_latent, W / pixels_per_latent].
    """
    height, width = (side // pixels_per_latent for side in valid.shape)
    blocks = valid.reshape(height, pixels_per_latent, width, pixels_per_latent)
    shares: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float64).astype(np.float32)
    return shares
