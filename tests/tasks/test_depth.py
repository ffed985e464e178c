"""Predictions of depth: their 16-bit and coloured forms, and their comparison with the true depth."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.depth_source import DepthSample
from d2f_fast.evaluation.depth import align_depth, depth_errors
from d2f_fast.tasks.depth import DepthPrediction, colour_preview, depth_png, measure_depth


def test_values_keep_16_bits_and_get_the_colours_of_marigold() -> None:
    prediction = DepthPrediction(np.array([[0.0, 0.5], [0.25, 1.0]], np.float32), None)
    assert np.asarray(depth_png(prediction)).tolist() == [[0, 32768], [16384, 65535]]
    colours = np.asarray(colour_preview(prediction))
    assert colours.shape == (2, 2, 3) and colours.dtype == np.uint8
    # The ends of matplotlib's map "Spectral".
    assert np.abs(colours[0, 0].astype(int) - [158, 1, 66]).max() <= 1
    assert np.abs(colours[1, 1].astype(int) - [94, 79, 162]).max() <= 1


def test_predictions_are_aligned_and_clipped_as_their_data_set_says() -> None:
    random = np.random.default_rng(0)
    depth, values = random.uniform(1, 9, (4, 40)).astype(np.float32), random.random((4, 40)).astype(np.float32)
    valid = depth < 8
    sample = DepthSample(Image.new("RGB", (40, 4)), depth, valid, "a.png")
    asked: list[Any] = []

    def predict(image: Image.Image, **options: Any) -> DepthPrediction:
        asked.append((image.size, options))
        return DepthPrediction(values, None)

    model: Any = SimpleNamespace(predict=predict, normalization="affine")
    for fit_side in (None, 10):
        images: Any = type("Images", (list,), {"least": 2.0, "most": 7.0, "fit_side": fit_side})([sample, sample])
        errors = measure_depth(model, images, 1, lambda done: None, steps=2)
        aligned = align_depth(values, depth, valid, least=2.0, most=7.0, fit_side=fit_side)
        assert errors == [depth_errors(aligned, depth, valid)]
    assert asked == [((40, 4), {"name": "a.png", "steps": 2})] * 2
    assert errors[0].abs_rel != pytest.approx(depth_errors(align_depth(values, depth, valid), depth, valid).abs_rel)
