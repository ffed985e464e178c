"""Depth in [-1, 1]: the published formulas, their inverses, and invalid pixels."""

from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from d2f_fast.data.depth_normalization import (
    DepthLimits,
    denormalize_depth,
    normalize_depth,
    valid_pixels,
    valid_share,
)
from d2f_fast.data.depth_options import DepthNormalization

KINDS = get_args(DepthNormalization)


@pytest.fixture
def depth() -> NDArray[np.float64]:
    return np.random.default_rng(0).uniform(0.5, 9.0, (24, 32))


@pytest.fixture
def valid(depth: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.random.default_rng(1).random(depth.shape) < 0.8


def test_affine_values_are_those_of_the_marigold_trainer(depth: NDArray[np.float64], valid: NDArray[np.bool_]) -> None:
    # Marigold, src/util/depth_transform.py, ScaleShiftDepthNormalizer
    known = torch.from_numpy(depth)
    low, high = torch.quantile(known[torch.from_numpy(valid)], torch.tensor([0.02, 0.98], dtype=torch.float64))
    expected = ((known - low) / (high - low) * 2 - 1).clip(-1, 1).numpy()
    values, limits = normalize_depth(depth, valid, "affine")
    assert np.abs(values - expected)[valid].max() <= 1e-6
    assert limits == pytest.approx((low.item(), high.item()), rel=1e-12)
    assert values[valid].min() == -1 and values[valid].max() == 1


def test_log_values_are_those_of_the_published_code(depth: NDArray[np.float64]) -> None:
    # diff2flow/dataset/depth_preprocessing.py, which knows no valid pixels here and clips nothing
    low, high = np.log(np.percentile(depth, (1, 99)))
    expected = ((np.log(depth) - low) / (high - low) - 0.5) * 2
    values, _ = normalize_depth(depth, np.ones_like(depth, bool), "log")
    assert np.abs(values - expected).max() <= 1e-6
    assert values.min() < -1 and values.max() > 1


def test_disparity_grows_towards_the_camera(depth: NDArray[np.float64], valid: NDArray[np.bool_]) -> None:
    values, limits = normalize_depth(depth, valid, "disparity")
    expected, _ = normalize_depth(1 / depth, valid, "affine")
    assert np.abs(values - expected).max() <= 1e-6
    assert limits.low > limits.high


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_gives_the_depth_back(kind: DepthNormalization, depth: NDArray[np.float64]) -> None:
    values, limits = normalize_depth(depth, np.ones_like(depth, bool), kind)
    kept = np.abs(values) < 1 if kind != "log" else np.ones_like(depth, bool)
    assert kept.mean() > 0.9
    assert np.abs(denormalize_depth(values, limits, kind) / depth - 1)[kept].max() <= 1e-5
    ends = denormalize_depth(np.array([-1.0, 1.0]), limits, kind)
    assert ends == pytest.approx(limits, rel=1e-12)


def test_disparity_beyond_the_horizon_is_infinite() -> None:
    assert denormalize_depth(np.array([-1.5, -3.0, 1.0]), DepthLimits(4.0, 1.0), "disparity").tolist() == [
        16.0,
        np.inf,
        1.0,
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [np.nan, 0.0, 1e9, -np.inf])
def test_depth_of_invalid_pixels_has_no_influence(
    kind: DepthNormalization, wrong: float, depth: NDArray[np.float64], valid: NDArray[np.bool_]
) -> None:
    expected, limits = normalize_depth(depth, valid, kind)
    values, same_limits = normalize_depth(np.where(valid, depth, wrong), valid, kind)
    assert np.array_equal(values, expected) and np.isfinite(values).all() and limits == same_limits


def test_invalid_pixels_are_interpolated_along_rows() -> None:
    depth, valid = np.array([[1.0, np.nan, 3.0, 0.0]]), np.array([[True, False, True, False]])
    values, _ = normalize_depth(depth, valid, "affine")
    assert values[0, 1] == pytest.approx(0, abs=1e-6) and values[0, 3] == values[0, 2] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_flat_depth_is_zero_and_keeps_its_depth(kind: DepthNormalization) -> None:
    values, limits = normalize_depth(np.full((4, 4), 2.5), np.ones((4, 4), bool), kind)
    assert not values.any()
    assert np.abs(denormalize_depth(values, limits, kind) - 2.5).max() <= 1e-12


def test_only_finite_positive_depth_in_range_is_valid() -> None:
    depth = np.array([np.nan, np.inf, -np.inf, -1.0, 0.0, 0.5, 1.0, 80.0, 81.0])
    assert valid_pixels(depth).tolist() == [False] * 5 + [True] * 4
    assert valid_pixels(depth, 1.0, 80.0).tolist() == [False] * 6 + [True, True, False]


def test_share_of_valid_pixels_is_their_mean_in_each_latent() -> None:
    valid = np.random.default_rng(0).random((16, 24)) < 0.5
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(valid)[None].double(), 8)[0]
    assert np.abs(valid_share(valid, 8) - expected.numpy()).max() <= 1e-7


def test_image_without_valid_pixel_and_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="no pixel has a depth that is finite, positive and in range"):
        normalize_depth(np.ones((2, 2)), np.zeros((2, 2), bool), "affine")
    with pytest.raises(ValueError, match=r"normalisation must be one of .*, got 'metric'"):
        normalize_depth(np.ones((2, 2)), np.ones((2, 2), bool), "metric")  # type: ignore[arg-type]
