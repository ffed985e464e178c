"""Test where plots place values."""

import re

import pytest

from d2f_fast.demo.plots import Bar, Line, bar_plot, line_plot


def test_plots_place_values_to_scale() -> None:
    plot = line_plot([Line("a", "#000", [(2, 1.0, 0.9, 1.1), (8, 4.0, 3.5, 4.5)])], "t", "x", "y", (2, 4, 8))
    (x1, y1), (x2, y2) = re.findall(r"([\d.]+),([\d.]+)", re.search(r'points="([^"]+)"', plot)[1])  # type: ignore[index]
    labels = {text: float(x) for x, text in re.findall(r'<text x="([\d.]+)"[^>]*>(\d)</text>', plot)}
    assert float(x1) < float(x2)
    assert float(y1) > float(y2)
    assert labels["2"] == pytest.approx(float(x1))
    assert labels["4"] == pytest.approx((float(x1) + float(x2)) / 2, abs=0.2)
    bars = bar_plot([Bar("half", "#000", 0.5, 0.4, 0.6), Bar("one <b>", "#000", 1.0, 0.9, 1.1)], "t")
    half, one = (float(width) for width in re.findall(r'width="([\d.]+)"', bars))
    assert one == pytest.approx(2 * half, abs=0.2)
    assert "one &lt;b&gt;" in bars
