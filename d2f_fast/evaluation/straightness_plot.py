"""Plot the straightness of paths as a PNG file: one panel of bars for each measure, over flow time."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from d2f_fast.evaluation.straightness import Straightness
from d2f_fast.files.atomic import atomic_path

# The plot is made at twice its size and then averaged, which smooths the edges.
_SCALE = 2
_PANEL, _HEIGHT, _MARGIN = 380, 300, 24
_TOP, _BOTTOM = 84, 56  # space above and below the bars
_BAR, _INK, _GREY, _GRID = "#0b7a75", "#222222", "#666666", "#bbbbbb"


def plot_straightness(path: Path, measured: Straightness, title: str) -> None:
    """Write a plot of the three measures in each segment of flow time, whole or not at all.

    Args:
        path: PNG file to write.
        measured: measures of the paths.
        title: text above the panels, which is cut where it is too long.

    Raises:
        RefusedInputError: The disk is full.
    """
    panels = (
        ("deviation from the straight path", measured.deviation),
        ("curvature", measured.curvature),
        ("error of one Euler step a segment", measured.step_error),
    )
    width = len(panels) * _PANEL + _MARGIN
    image = Image.new("RGB", (width * _SCALE, _HEIGHT * _SCALE), "white")
    canvas = ImageDraw.Draw(image)
    font = _font(15)
    while canvas.textlength(title, font) > (width - 2 * _MARGIN) * _SCALE:
        title = title.removesuffix(" …")[:-1] + " …"
    canvas.text((_MARGIN * _SCALE, 12 * _SCALE), title, _INK, font)
    for number, (name, values) in enumerate(panels):
        _panel(canvas, _MARGIN + number * _PANEL, name, values)
    with atomic_path(path) as temporary:
        image.resize((width, _HEIGHT), Image.Resampling.BOX).save(temporary, "PNG")


def _panel(canvas: ImageDraw.ImageDraw, left: int, name: str, values: Sequence[float]) -> None:
    """Add the bars of one measure, each with its value, over the axis of flow time."""
    width, bottom = _PANEL - _MARGIN, _HEIGHT - _BOTTOM
    each = width / len(values)
    highest = max(values) or 1.0

    def text(x: float, y: float, words: str, colour: str, size: int, anchor: str) -> None:
        canvas.text((x * _SCALE, y * _SCALE), words, colour, _font(size), anchor)

    text(left, _TOP - 30, name, _INK, 14, "ls")
    for number, value in enumerate(values):
        x = left + number * each
        top = bottom - value / highest * (bottom - _TOP)
        canvas.rectangle([(x + 3) * _SCALE, top * _SCALE, (x + each - 3) * _SCALE, bottom * _SCALE], _BAR)
        text(x + each / 2, top - 4, f"{value:.2g}", _INK, 11, "ms")
    canvas.line([left * _SCALE, bottom * _SCALE, (left + width) * _SCALE, bottom * _SCALE], _GRID, _SCALE)
    for quarter in range(5):
        x = left + quarter / 4 * width
        canvas.line([x * _SCALE, bottom * _SCALE, x * _SCALE, (bottom + 4) * _SCALE], _GREY, _SCALE)
        text(x, bottom + 18, f"{quarter / 4:g}", _GREY, 12, "ms")
    text(left + width / 2, bottom + 40, "flow time: 0 noise, 1 image", _GREY, 12, "ms")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font in a size in pixels of the finished plot."""
    return ImageFont.load_default(size * _SCALE)
