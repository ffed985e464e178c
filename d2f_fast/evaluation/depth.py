"""Compare predicted depth with true depth, as Marigold's evaluation does: align, clip, measure, average over images.

    scale, shift = argmin Σ (scale · prediction + shift - y)²    over the valid pixels of one image; y = d, log d or 1/d
    depth        = the d of scale · prediction + shift, clipped to the range of the data set and to at least 1e-6 m;
                   a disparity is clipped to at least 1e-3 / m before it becomes depth
    abs_rel      = mean |depth - d| / d
    delta1       = share of max(depth / d, d / depth) < 1.25
    rmse         = sqrt(mean (depth - d)²)
    log10        = mean |log10 depth - log10 d|

All means are over the valid pixels of one image, so that each image counts alike. Everything is computed in float64.
The steps and their order are those of script/depth/eval.py and src/util/alignment.py in prs-eth/Marigold. There, a fit
of disparity leaves out the pixels that are predicted as 0 or less; here they count, because 0 is the far end of [0, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2f_fast.data.depth_normalization import from_depth, to_depth
from d2f_fast.data.depth_options import DepthNormalization
from d2f_fast.evaluation.distances import Interval, bootstrap_interval

LEAST_DEPTH = 1e-6
LEAST_DISPARITY = 1e-3
_DELTA = 1.25


class DepthErrors(NamedTuple):
    """Errors of the depth of one image.

    Attributes:
        abs_rel: Mean relative error.
        delta1: Share of pixels in [0, 1] whose depth is wrong by less than a quarter.
        rmse: Root of the mean squared error, in metres.
        log10: Mean error of the decimal logarithm.
    """

    abs_rel: float
    delta1: float
    rmse: float
    log10: float


def fit_scale_and_shift(
    prediction: NDArray[np.floating],
    target: NDArray[np.floating],
    valid: NDArray[np.bool_],
    fit_side: int | None = None,
) -> tuple[float, float]:
    """Return the scale and the shift that bring a prediction nearest to a target, by least squares.

    Args:
        prediction: Prediction, [H, W].
        target: What it should be up to a scale and a shift, [H, W].
        valid: Which pixels count, [H, W].
        fit_side: Longer side in pixels above which only some columns are fitted, see `fitted_columns`; None for all.

    Raises:
        ValueError: No pixel counts.
    """
    if fit_side is not None:
        columns = fitted_columns(valid.shape, fit_side)
        prediction, target, valid = prediction[:, columns], target[:, columns], valid[:, columns]
    if not valid.any():
        raise ValueError("no pixel is valid, so that no scale and shift can be found")
    known = prediction[valid].astype(np.float64)
    design = np.stack([known, np.ones_like(known)], axis=1)
    scale, shift = np.linalg.lstsq(design, target[valid].astype(np.float64), rcond=None)[0]
    return float(scale), float(shift)


def fitted_columns(shape: tuple[int, ...], fit_side: int) -> NDArray[np.intp]:
    """Return the columns that Marigold's code fits in a large image.

    Its option --alignment_max_res, 1024 for ETH3D, is meant to scale both sides down. It takes every row, and as many
    columns as the scaled width has.

    Args:
        shape: Height and width of the image.
        fit_side: Longer side in pixels that the image would be scaled to; a smaller image keeps all its columns.
    """
    width, factor = shape[1], fit_side / max(shape)
    if factor >= 1:
        return np.arange(width)
    kept = np.arange(int(width * factor), dtype=np.float32) * np.float32(1 / factor)
    columns: NDArray[np.intp] = np.minimum(kept.astype(np.intp), width - 1)
    return columns


def align_depth(
    prediction: NDArray[np.floating],
    depth: NDArray[np.floating],
    valid: NDArray[np.bool_],
    kind: DepthNormalization = "affine",
    *,
    least: float = LEAST_DEPTH,
    most: float = np.inf,
    fit_side: int | None = None,
) -> NDArray[np.float64]:
    """Return the depth of a prediction that is known up to a scale and a shift, in metres and clipped.

    Args:
        prediction: Output of a model, [H, W], in any affine scale.
        depth: True depth in metres, [H, W].
        valid: Which pixels count, [H, W].
        kind: Normalisation that the model was trained with, which says what its output is affine in.
        least: Smallest depth of the data set, in metres.
        most: Largest depth of the data set, in metres.
        fit_side: Longer side in pixels above which only some columns are fitted; None for all.

    Raises:
        ValueError: No pixel counts.
    """
    target = from_depth(np.where(valid, depth, 1.0), kind)
    scale, shift = fit_scale_and_shift(prediction, target, valid, fit_side)
    y = scale * prediction.astype(np.float64) + shift
    if kind == "disparity":
        y = y.clip(LEAST_DISPARITY)
    return to_depth(y, kind).clip(least, most).clip(LEAST_DEPTH)


def depth_errors(aligned: NDArray[np.floating], depth: NDArray[np.floating], valid: NDArray[np.bool_]) -> DepthErrors:
    """Return the errors of the aligned depth of one image.

    Args:
        aligned: Depth in metres, positive, [H, W]; see `align_depth`.
        depth: True depth in metres, [H, W].
        valid: Which pixels count, [H, W]; at least one of them.
    """
    got, true = aligned[valid].astype(np.float64), depth[valid].astype(np.float64)
    return DepthErrors(
        abs_rel=float(np.mean(np.abs(got - true) / true)),
        delta1=float(np.mean(np.maximum(got / true, true / got) < _DELTA)),
        rmse=float(np.sqrt(np.mean((got - true) ** 2))),
        log10=float(np.mean(np.abs(np.log10(got) - np.log10(true)))),
    )


def error_intervals(errors: Sequence[DepthErrors], *, repeats: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Return the mean of each error with its 95 % interval, by resampling the images.

    Args:
        errors: Errors of each image, at least one.
        repeats: Number of resamplings.
        seed: Seed of the resamplings.
    """
    columns = np.asarray(errors, np.float64).T
    return {
        name: bootstrap_interval(lambda values: float(values.mean()), column, repeats=repeats, seed=seed)
        for name, column in zip(DepthErrors._fields, columns, strict=True)
    }
