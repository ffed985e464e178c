"""Test where plots place values."""

import re

import pytest

from d2f_fast.demo.plots import Bar, Line, _apart, _ticks, bar_plot, line_plot


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("low", [0.013, 0.7, 1.9, 40.0])
@pytest.mark.parametrize("ratio", [1.2, 1.5, 2.2, 4.0, 11.0, 900.0])
def test_axis_has_several_round_ticks_in_its_range(low: float, ratio: float, log: bool) -> None:
    ticks = _ticks(low, low * ratio, log)
    assert 3 <= len(ticks) <= 10
    assert all(low * (1 - 1e-9) <= tick <= low * ratio * (1 + 1e-9) for tick in ticks)
    assert all(len(f"{tick:g}".strip("0.").replace(".", "")) <= 3 for tick in ticks)


def test_labels_of_close_levels_do_not_overlap() -> None:
    assert _apart([50.0, 20.0, 52.0, 21.0]) == [50.0, 20.0, 63.0, 33.0]
    plot = line_plot([Line("a", "#000", [(2, 1.0, 0.9, 1.1)])], "t", "x", "y", (2, 4), [("one", 1.0), ("two", 1.01)])
    one, two = (float(re.search(rf'y="([\d.]+)"[^>]*>{name}<', plot)[1]) for name in ("one", "two"))  # type: ignore[index]
    assert abs(one - two) >= 13


def test_labels_of_close_ticks_are_left_out() -> None:
    plot = line_plot([Line("a", "#000", [(160, 1.0, 0.9, 1.1)])], "t", "x", "y", (0, 155, 160, 1000))
    assert all(f">{tick}</text>" in plot for tick in (0, 155, 1000)) and ">160</text>" not in plot


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
