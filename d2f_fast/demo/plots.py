"""Write small plots as SVG text, which any browser shows: lines with intervals, and bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {
    "base": "#7a7a85",
    "diff2flow": "#0b7a75",
    "fm": "#d1495b",
    "diffusion": "#3d5a98",
    "real": "#b08900",
}
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44


@dataclass(frozen=True)
class Line:
    """One curve of a plot.

    Args:
        label: name of the curve, in the legend and on each point.
        colour: CSS colour.
        points: points (x, y, low, high) in the order of x; low and high bound the interval of y.
        dash: SVG dash pattern; "" for a solid line.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    dash: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar of a plot.

    Args:
        label: name of the bar.
        colour: CSS colour.
        value: length of the bar.
        low, high: bounds of its interval.
    """

    label: str
    colour: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Scale:
    """Linear or logarithmic map from values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return round values within a range, at least three of them."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
            found = [m * 10.0**e for e in exponents for m in multiples if low <= m * 10.0**e <= high]
            if len(found) >= 4 or (len(found) == 3 and len(multiples) > 2):
                return found
        return _ticks(low, high, log=False)  # Over less than half a decade a logarithm is nearly linear.
    exponent = math.floor(math.log10(high - low))
    found = []
    for step in (m * 10.0**e for e in (exponent, exponent - 1) for m in (5, 2, 1)):
        found = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(found) >= 3:
            break
    return found


def _apart(heights: Sequence[float], least: float = 13.0) -> list[float]:
    """Move labels, whose heights in pixels are given, down as far as needed so that none overlaps another."""
    placed: dict[int, float] = {}
    last = -math.inf
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        placed[i] = last = max(heights[i], last + least)
    return [placed[i] for i in range(len(heights))]


def _text(x: float, y: float, words: str, **attributes: str) -> str:
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{escape(words)}</text>'


def _frame(y: _Scale, label: str) -> list[str]:
    """Return horizontal grid lines, their values, and the label of the axis."""
    parts = []
    for tick in _ticks(y.low, y.high, y.log):
        height = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(LEFT - 6, height + 4, f"{tick:g}", text_anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"rotate(-90 13 {middle:.0f})"
    return [*parts, _text(13, middle, label, text_anchor="middle", transform=turned)]


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    """Return the whole SVG; a screen reader says its title."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def line_plot(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    levels: Sequence[tuple[str, float]] = (),
) -> str:
    """Plot curves with logarithmic axes.

    Args:
        lines: curves to plot.
        title: title of the plot.
        x_label, y_label: labels of the axes.
        x_ticks: values of x that occur, rising. x = 0 is placed at half of the first positive value.
        levels: horizontal lines, (label, y) each.

    Returns:
        SVG text.
    """
    points = [point for line in lines for point in line.points]
    values = [value for point in points for value in point[1:] if value > 0] + [
        value for _, value in levels if value > 0
    ]
    y = _Scale(min(values) / 1.15, max(values) * 1.15, HEIGHT - BOTTOM, TOP, log=True)
    positive = [tick for tick in x_ticks if tick > 0]
    low = positive[0] / (2 if x_ticks[0] == 0 else 1)
    x = _Scale(low, max(positive[-1], 2 * low), LEFT + 14, WIDTH - RIGHT - 14, log=True)
    parts = _frame(y, y_label)
    last = -math.inf
    for tick in x_ticks:
        if x(tick) - last >= 8 * len(f"{tick:g}") + 4:  # Labels are about 8 pixels wide for each digit.
            parts.append(_text(x(tick), HEIGHT - BOTTOM + 17, f"{tick:g}", text_anchor="middle"))
            last = x(tick)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, text_anchor="middle"))
    for _, value in levels:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    for line in lines:
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _, _ in line.points)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        for px, _, point_low, point_high in line.points:
            ends = f'y1="{y(point_low):.1f}" y2="{y(point_high):.1f}"'
            parts.append(f'<line x1="{x(px):.1f}" x2="{x(px):.1f}" {ends} stroke="{line.colour}" opacity=".45"/>')
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        parts += [
            f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3" fill="{line.colour}">'
            f"<title>{escape(line.label)}: {py:.3g} at {px:g}</title></circle>"
            for px, py, _, _ in line.points
        ]
    # Last, and with a white edge, so that no curve crosses a label.
    for (label, _), height in zip(levels, _apart([y(value) - 4 for _, value in levels]), strict=True):
        edge = "paint-order:stroke;stroke:#fff;stroke-width:4px"
        parts.append(_text(WIDTH - RIGHT, height, label, text_anchor="end", style=edge))
    return _svg(parts, title)


def bar_plot(bars: Sequence[Bar], title: str, level: float = 1.0, left: float = 190) -> str:
    """Plot horizontal bars with intervals.

    Args:
        bars: bars to plot, from top to bottom.
        title: title of the plot.
        level: value of the dashed vertical line.
        left: width in pixels that is reserved for the labels.

    Returns:
        SVG text.
    """
    row = 26
    height = row * len(bars) + 34
    x = _Scale(0, max([level, *(bar.high for bar in bars)]) * 1.05, left, WIDTH - RIGHT, log=False)
    parts = []
    for tick in _ticks(x.low, x.high, log=False):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 26}"/>')
        parts.append(_text(x(tick), height - 10, f"{tick:g}", text_anchor="middle"))
    for i, bar in enumerate(bars):
        top = 8 + i * row
        parts.append(_text(left - 8, top + 13, bar.label, text_anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{top}" width="{x(bar.value) - left:.1f}" height="{row - 9}" rx="2"'
            f' fill="{bar.colour}" opacity=".85"><title>{bar.value:.3f}</title></rect>'
        )
        middle = top + (row - 9) / 2
        parts.append(
            f'<line x1="{x(bar.low):.1f}" x2="{x(bar.high):.1f}" y1="{middle}" y2="{middle}" class="interval"/>'
        )
    parts.append(f'<line class="level" x1="{x(level):.1f}" x2="{x(level):.1f}" y1="4" y2="{height - 26}"/>')
    return _svg(parts, title, height)


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return the legend of a plot as HTML; each entry is (label, colour, dash)."""
    keys = [
        f'<span><svg class="key" viewBox="0 0 24 8"><line x1="0" x2="24" y1="4" y2="4" stroke="{colour}"'
        f' stroke-width="2.5" stroke-dasharray="{dash}"/></svg>{escape(label)}</span>'
        for label, colour, dash in entries
    ]
    return f'<p class="legend">{"".join(keys)}</p>'
