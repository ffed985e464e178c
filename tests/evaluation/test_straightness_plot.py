"""Test that the plot's bars are as long as the values, and that a long title fits."""

from pathlib import Path

import numpy as np
from PIL import Image

from d2f_fast.evaluation.straightness import Straightness
from d2f_fast.evaluation.straightness_plot import plot_straightness


def test_bars_are_proportional_to_the_values(tmp_path: Path) -> None:
    values = (1.0, 0.5, 0.25, 0.0)
    plot_straightness(tmp_path / "a.png", Straightness(values, (0.0,) * 4, values[::-1]), "title " * 60)
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    is_bar = np.abs(pixels - (0x0B, 0x7A, 0x75)).sum(-1) < 30
    heights = is_bar.sum(0)
    # One column of pixels in the middle of each bar of the first panel, and of the last one.
    for left, expected in ((24, values), (24 + 2 * 380, values[::-1])):
        middle = [heights[round(left + (i + 0.5) * 356 / 4)] for i in range(4)]
        assert np.allclose(np.array(middle) / heights.max(), expected, atol=0.02)
    assert not is_bar[:, 380:740].any(axis=0).any() or heights[380:740].max() <= 1
    assert (pixels[:, -10:] == 255).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
