"""Predictions of depth: their 16-bit and coloured forms."""

import numpy as np

from d2f_fast.tasks.depth import DepthPrediction, colour_preview, depth_png


def test_values_keep_16_bits_and_get_the_colours_of_marigold() -> None:
    prediction = DepthPrediction(np.array([[0.0, 0.5], [0.25, 1.0]], np.float32), None)
    assert np.asarray(depth_png(prediction)).tolist() == [[0, 32768], [16384, 65535]]
    colours = np.asarray(colour_preview(prediction))
    assert colours.shape == (2, 2, 3) and colours.dtype == np.uint8
    # The ends of matplotlib's map "Spectral".
    assert np.abs(colours[0, 0].astype(int) - [158, 1, 66]).max() <= 1
    assert np.abs(colours[1, 1].astype(int) - [94, 79, 162]).max() <= 1
