"""Errors of depth: a worked example, an independent computation, and the order of the operations."""

import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from d2f_fast.data.depth_options import DepthNormalization
from d2f_fast.evaluation.depth import (
    DepthErrors,
    align_depth,
    depth_errors,
    error_intervals,
    fit_scale_and_shift,
    fitted_columns,
)


def computed_apart(
    prediction: NDArray[np.float64], depth: NDArray[np.float64], valid: NDArray[np.bool_], kind: str, most: float
) -> DepthErrors:
    """Return the errors by the normal equations and plain sums, pixel by pixel."""
    y_of = {"affine": lambda d: d, "log": math.log, "disparity": lambda d: 1 / d}[kind]
    d_of = {"affine": lambda y: y, "log": math.exp, "disparity": lambda y: 1 / max(y, 1e-3)}[kind]
    pixels = [(p, d) for p, d, v in zip(prediction.flat, depth.flat, valid.flat, strict=True) if v]
    n = len(pixels)
    # In whole fractions, so that nothing is rounded in the sums.
    points = [(Fraction(float(p)), Fraction(float(y_of(d)))) for p, d in pixels]
    sum_p, sum_y = (sum(values) for values in zip(*points, strict=True))
    sum_pp, sum_py = sum(p * p for p, _ in points), sum(p * y for p, y in points)
    scale = float((n * sum_py - sum_p * sum_y) / (n * sum_pp - sum_p**2))
    shift = (float(sum_y) - scale * float(sum_p)) / n
    got = [(max(min(d_of(scale * p + shift), most), 1e-6), d) for p, d in pixels]
    return DepthErrors(
        sum(abs(g - d) / d for g, d in got) / n,
        sum(max(g / d, d / g) < 1.25 for g, d in got) / n,
        math.sqrt(sum((g - d) ** 2 for g, d in got) / n),
        sum(abs(math.log10(g / d)) for g, d in got) / n,
    )


@pytest.mark.parametrize("kind", get_args(DepthNormalization))
def test_errors_equal_an_independent_computation(kind: DepthNormalization) -> None:
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        depth = random.uniform(0.5, 12, (9, 11))
        prediction = (np.log(depth) + random.normal(0, 0.4, depth.shape)).astype(dtype)
        valid = random.random(depth.shape) < 0.7
        aligned = align_depth(prediction, np.where(valid, depth, np.nan), valid, kind, most=10.0)
        errors = depth_errors(aligned, np.where(valid, depth, 1e9), valid)
        expected = computed_apart(prediction.astype(np.float64), depth, valid, kind, 10.0)
        assert np.abs(np.array(errors) - expected).max() <= 1e-6
        assert errors.abs_rel > 0 and 0 < errors.delta1 < 1


def test_worked_example_in_the_order_of_the_published_protocol() -> None:
    # Align on the three valid pixels: 1.5 p + 5/6 gives 5/6, 7/3 and 23/6; then clip to 3.5, the largest depth of the
    # set; then the means. Clipping first, or aligning on all four pixels, would give other numbers.
    prediction, depth = np.array([[0.0, 1.0], [2.0, 7.0]]), np.array([[1.0, 2.0], [4.0, 1.0]])
    valid = np.array([[True, True], [True, False]])
    assert fit_scale_and_shift(prediction, depth, valid) == pytest.approx((1.5, 5 / 6), abs=1e-12)
    aligned = align_depth(prediction, depth, valid, least=0.1, most=3.5)
    assert aligned[valid] == pytest.approx([5 / 6, 7 / 3, 3.5], abs=1e-12)
    errors = depth_errors(aligned, depth, valid)
    assert errors.abs_rel == pytest.approx(11 / 72, abs=1e-12)
    assert errors.delta1 == 1
    assert errors.rmse == pytest.approx(math.sqrt(14 / 108), abs=1e-12)
    logs = (math.log10(6 / 5) + math.log10(7 / 6) + math.log10(8 / 7)) / 3
    assert errors.log10 == pytest.approx(logs, abs=1e-12)


def test_depth_that_aligns_below_zero_is_clipped_before_it_is_compared() -> None:
    prediction, depth = np.array([[0.0, 1.0, 1.1, 1.2]]), np.array([[0.1, 0.1, 4.0, 8.0]])
    aligned = align_depth(prediction, depth, np.ones_like(depth, bool))
    assert aligned.min() == 1e-6
    assert np.isfinite(depth_errors(aligned, depth, np.ones_like(depth, bool))).all()
    assert align_depth(prediction, depth, np.ones_like(depth, bool), least=0.05).min() == 0.05


def test_disparity_beyond_the_horizon_becomes_1000_metres_as_in_the_published_code() -> None:
    # script/depth/eval.py: np.clip(disparity_pred, a_min=1e-3, a_max=None), and then 1 / disparity.
    prediction, depth = np.array([[0.0, 0.5, 0.6, 1.0]]), np.array([[900.0, 10.0, 2.0, 1.0]])
    valid = np.ones_like(depth, bool)
    scale, shift = np.polyfit(prediction[0], 1 / depth[0], 1)
    assert shift < 0
    aligned = align_depth(prediction, depth, valid, "disparity")
    assert aligned[0, 0] == 1000 and aligned[0, 3] == pytest.approx(1 / (scale + shift))
    assert np.isfinite(depth_errors(aligned, depth, valid)).all()


@pytest.mark.parametrize(
    ("shape", "side"), [((4032, 6048), 1024), ((5, 61), 20), ((9, 4), 6), ((3, 7), 7), ((3, 4), 8)]
)
def test_large_images_are_fitted_on_the_columns_of_the_published_code(shape: tuple[int, int], side: int) -> None:
    # src/util/alignment.py, align_depth_least_square: [1, H, W] is for torch a row of W values with H channels.
    factor = np.min(side / np.array(shape))
    downscaler = torch.nn.Upsample(scale_factor=factor, mode="nearest") if factor < 1 else torch.nn.Identity()
    columns = downscaler(torch.arange(shape[1]).float().expand(1, min(shape[0], 2), -1)).long()
    assert columns.shape[1] == min(shape[0], 2)
    assert np.array_equal(fitted_columns(shape, side), columns[0, 0])


def test_alignment_of_a_large_image_equals_the_published_code() -> None:
    random = np.random.default_rng(1)
    prediction, depth = random.random((5, 61)), random.uniform(1, 9, (5, 61))
    valid = random.random(depth.shape) < 0.6
    columns = np.floor(np.arange(20) * 3.05).astype(int)
    x, y, known = (array[:, columns] for array in (prediction, depth, valid))
    scale, shift = np.polyfit(x[known], y[known], 1)
    aligned = align_depth(prediction, np.where(valid, depth, np.nan), valid, fit_side=20)
    assert np.abs(aligned - (scale * prediction + shift)).max() <= 1e-9
    assert np.abs(aligned - align_depth(prediction, depth, valid)).max() > 1e-3


@pytest.mark.parametrize("kind", get_args(DepthNormalization))
def test_scale_and_shift_of_the_prediction_do_not_matter(kind: DepthNormalization) -> None:
    random = np.random.default_rng(0)
    depth = random.uniform(0.5, 12, (8, 8))
    y = {"affine": depth, "log": np.log(depth), "disparity": 1 / depth}[kind]
    valid = np.ones_like(depth, bool)
    for scale, shift in ((1.0, 0.0), (-3.0, 5.0), (0.01, 100.0)):
        errors = depth_errors(align_depth(scale * y + shift, depth, valid, kind), depth, valid)
        assert errors.abs_rel <= 1e-9 and errors.delta1 == 1


def test_mean_counts_each_image_alike_and_lies_in_its_interval() -> None:
    errors = [DepthErrors(0.1 * i, 1 - 0.1 * i, float(i), 0.0) for i in range(10)]
    intervals = error_intervals(errors)
    assert intervals["abs_rel"].value == pytest.approx(0.45) and intervals["delta1"].value == pytest.approx(0.55)
    assert intervals["abs_rel"].low < 0.45 - 0.1 and intervals["abs_rel"].high > 0.45 + 0.1
    assert intervals["rmse"].value == pytest.approx(4.5) and intervals["log10"].high == 0
    assert error_intervals(errors) == intervals


def test_image_without_valid_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixel is valid"):
        fit_scale_and_shift(np.ones((2, 2)), np.ones((2, 2)), np.zeros((2, 2), bool))
