"""Write the demo's `report.html`: one file that holds images, plots and tables, and opens without a network."""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.measurements import BASE, REFLOW, Measurements
from d2f_fast.demo.networks import CONTINUED, STYLE
from d2f_fast.demo.plots import COLOURS, Line, legend, line_plot
from d2f_fast.demo.rows import Row, Section, best, excess, select, training_curve
from d2f_fast.demo.summary import EARLY, readings
from d2f_fast.files.atomic import atomic_path
from d2f_fast.models.base_model import to_pil

LABELS = {
    "base": "base, untouched",
    "fm": "naive flow LoRA, as published",
    "diffusion": "diffusion LoRA",
    "diff2flow": "aligned LoRA",
    "reflow": "reflow LoRA",
    "style": "aligned LoRA",
}
INTERVAL = "95\N{NO-BREAK SPACE}% interval"  # A line never breaks before the sign.
DISTANCE = "Fréchet distance (lower is better)"
TILE, LABEL_WIDTH, HEADER = 96, 210, 40  # pixels
IN_README = (1, 2, 25)  # evaluations whose rows the picture of the README has


class GridRow(NamedTuple):
    """A row of an image grid.

    Args:
        title: name of the network.
        subtitle: how the images were made.
        images: one image for each column.
    """

    title: str
    subtitle: str
    images: Sequence[Image.Image]


class Grid(NamedTuple):
    """An image grid.

    Args:
        captions: caption of each column.
        rows: rows of images.
        note: text below the images.
    """

    captions: Sequence[str]
    rows: Sequence[GridRow]
    note: str


STYLESHEET = """
:root { color-scheme: light; --ink: #1d1d24; --soft: #63636e; --rule: #e3e3e8; --paper: #fbfbfa }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
.lead { color: var(--soft); margin: 0 0 1.6rem } .reading { border-left: 3px solid #0b7a75; padding-left: 1rem }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem }
.tiles td, .tiles th { padding: 2px; border: 0; white-space: normal; vertical-align: middle }
.tiles thead th { width: 5.2rem; max-width: 5.2rem; overflow-wrap: anywhere;
  vertical-align: bottom; text-align: left; font-weight: 400; font-size: .72rem }
.tiles th[scope=row] { min-width: 6.5rem; padding-right: .7rem; text-align: left; color: var(--ink) }
.tiles small { display: block; color: var(--soft); font-weight: 400 }
.tiles img { display: block; width: 5rem; height: 5rem; image-rendering: pixelated }
.plots { max-width: 36rem }
.plots figure { margin: 0; background: #fff; border: 1px solid var(--rule); border-radius: 8px; padding: .8rem }
svg { width: 100%; height: auto } svg text { font: 11.5px system-ui, sans-serif; fill: var(--soft) }
.grid { stroke: #ececf0 } .level { stroke: #b08900; stroke-dasharray: 5 4 } .interval { stroke: #1d1d24 }
.legend { font-size: .85rem; color: var(--soft); margin: .5rem 0 0 }
.legend span { margin-right: 1.1rem; white-space: nowrap }
.key { width: 24px; height: 8px; margin-right: .4rem; vertical-align: middle }
.scroll { overflow-x: auto; background:
  linear-gradient(90deg, var(--paper) 30%, transparent) left / 3rem 100% local,
  linear-gradient(270deg, var(--paper) 30%, transparent) right / 3rem 100% local,
  linear-gradient(90deg, #0003, transparent) left / .9rem 100% scroll,
  linear-gradient(270deg, #0003, transparent) right / .9rem 100% scroll; background-repeat: no-repeat }
.cue { display: none; color: var(--soft); font-size: .8rem; margin: .3rem 0 }
@media (max-width: 60rem) { .cue { display: block } }
@media (max-width: 40rem) { body { padding: 1.2rem .8rem 3rem } h1 { font-size: 1.5rem } }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom }
td:first-child, th:first-child { text-align: left }
.best { font-weight: 700; color: #0b7a75 }
"""


def write_report(folder: Path, measurements: Measurements, seconds: float) -> Path:
    """Write the image grids as PNG files, and `report.html` with everything inlined.

    Args:
        folder: folder for the files.
        measurements: measurements of a whole demo.
        seconds: duration of the run.

    Returns:
        Path of `report.html`.
    """
    rows, settings = measurements.rows, measurements.settings
    few_steps = _few_steps_grid(measurements, settings.evaluations)
    grids: dict[Section, list[Grid]] = {
        "same_images": [_same_images_grid(measurements)],
        "continued": [_continued_grid(measurements)],
        "few_steps": [few_steps],
        "style": [
            _style_grid(measurements, measurements.trained, "trained"),
            _style_grid(measurements, measurements.held_out, "held out"),
        ],
    }
    shown = tuple(count for count in settings.evaluations if count in IN_README)
    with atomic_path(folder / "few-steps.png") as temporary:
        temporary.write_bytes(_png(image_grid(_few_steps_grid(measurements, shown))))
    last = settings.curve_points[-1]
    headings: dict[Section, tuple[str, str]] = {
        "same_images": ("The same weights, the same images", ""),
        "continued": (
            f"Training further on the base's own style, {last} steps",
            _panel(_continued_plot(rows), _continued_caption(rows), _continued_legend()),
        ),
        "few_steps": ("Few steps", _few_steps_table(rows)),
        "style": (f"Learning a second style, {last} steps", _style_table(rows)),
    }
    words = readings(rows)
    sections = [
        f"<h2>{escape(title)}</h2><p class='reading'>{escape(' '.join(words[name]))}</p>"
        f"{''.join(_figure(grid) for grid in grids[name])}{numbers}"
        for name, (title, numbers) in headings.items()
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    lead = (
        "A miniature of Stable Diffusion, which is part of the package, generates emoji of 32 x 32 pixels."
        f" Seed {measurements.seed}, {seconds / 60:.1f} minutes, {escape(versions)}."
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Diff2Flow demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLESHEET}</style></head><body><h1>Diff2Flow on an embedded miniature</h1>"
        f'<p class="lead">{lead}</p>{"".join(sections)}</body></html>\n'
    )
    path = folder / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _real_row(images_of: EvaluationSet, positions: Sequence[int], subtitle: str) -> GridRow:
    """Return the row of real images of the shown captions."""
    return GridRow("real images", subtitle, to_pil(images_of.real[list(positions)]))


def _same_images_grid(measurements: Measurements) -> Grid:
    """Return the images of the base's own sampler, and along the flow."""
    steps, count = measurements.settings.own_steps, measurements.settings.own_images
    domain = measurements.domain
    positions = domain.one_of_each_colour()[:count]
    subtitles = {
        "ddim": ("base, its own sampler", f"DDIM, {steps} steps"),
        "same times": ("base, along the flow", f"{steps} steps at the same times"),
        "even times": ("base, along the flow", f"{steps} even steps from t = 0"),
    }
    rows = [
        GridRow(*words, to_pil(measurements.shown["same_images", name, steps])) for name, words in subtitles.items()
    ]
    note = f"Guidance {measurements.settings.guidance_scale:g}. The images of a column start from the same noise."
    return Grid([domain.prompts[i] for i in positions], rows, note)


def _continued_grid(measurements: Measurements) -> Grid:
    """Return the images before training, early and at the end."""
    domain, points = measurements.domain, measurements.settings.curve_points
    early = max(point for point in points if point <= EARLY)
    positions = domain.one_of_each_colour()
    rows = [_real_row(domain, positions, "the base's own style")]
    for network in CONTINUED:
        for step in dict.fromkeys((0, early, points[-1])):
            images = to_pil(measurements.shown["continued", network, step])
            rows.append(GridRow(LABELS[network], f"after {step} training steps", images))
    note = (
        f"Each image took {measurements.settings.curve_evaluations} network evaluations, without guidance. The base was"
        " trained on these names. The images of a column start from the same noise."
    )
    return Grid([domain.prompts[i] for i in positions], rows, note)


def _few_steps_grid(measurements: Measurements, evaluations: Sequence[int]) -> Grid:
    """Return the images of the base at its best setting, and of the reflow LoRA, at some numbers of evaluations."""
    domain, rows = measurements.domain, []
    for network in (BASE, REFLOW):
        for count in evaluations:
            chosen = best(
                [row for row in select(measurements.rows, "few_steps", network=network) if _allowed(row) == count]
            )
            guided = f"guided, {chosen['steps']} steps" if chosen["guidance_scale"] > 1 else "no guidance"
            images = to_pil(measurements.shown["few_steps", network, count])
            title = f"{LABELS[network].split(',')[0]}, {count} evaluation{'' if count == 1 else 's'}"
            rows.append(GridRow(title, guided, images))
    note = (
        "Guidance takes two evaluations a step, and counts so: with an odd number of them the base makes one evaluation"
        " less. The images of a column start from the same noise."
    )
    return Grid([domain.prompts[i] for i in domain.one_of_each_colour()], rows, note)


def _allowed(row: Row) -> int:
    """Return the number of evaluations for which a row of the few-step comparison was measured."""
    return row["allowed"]


def _style_grid(measurements: Measurements, images_of: EvaluationSet, names: str) -> Grid:
    """Return real images of the second style, and those of the base and the LoRA for the same captions."""
    steps = measurements.settings.style_evaluations // 2
    positions = images_of.one_of_each_colour()
    rows = [_real_row(images_of, positions, "the style to learn")]
    for network in (BASE, STYLE):
        images = to_pil(measurements.shown["style", f"{network} {names}", steps])
        rows.append(GridRow(LABELS[network], f"guided, {steps} steps", images))
    seen = "Names in the training." if names == "trained" else "Names that the training never saw."
    return Grid([images_of.prompts[i] for i in positions], rows, seen)


def image_grid(grid: Grid) -> Image.Image:
    """Put the rows of a grid into one image, with a column for each caption."""
    captions, rows, _ = grid
    size = (LABEL_WIDTH + TILE * len(captions), HEADER + TILE * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen, bold, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(11)
    for column, caption in enumerate(captions):
        for line, text in enumerate(_caption_words(caption)):
            pen.text((LABEL_WIDTH + column * TILE + 3, 5 + 16 * line), _shorten(text, small), "#63636e", small)
    for row, (title, subtitle, images) in enumerate(rows):
        top = HEADER + row * TILE
        pen.text((8, top + 28), title, "#1d1d24", bold)
        pen.text((8, top + 50), subtitle, "#63636e", small)
        for column, image in enumerate(images):
            tile = image.resize((TILE - 4, TILE - 4), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL_WIDTH + column * TILE + 2, top + 2))
    return sheet


def _caption_words(caption: str) -> tuple[str, str]:
    """Return the name and the background colour in a caption."""
    name, _, background = caption.partition(" on a ")
    return name.split(" ", 1)[1], background.removesuffix(" background")


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a text to the width of a tile, with an ellipsis where something was cut."""
    if font.getlength(text) <= TILE - 6:
        return text
    while font.getlength(f"{text}…") > TILE - 6:
        text = text[:-1]
    return f"{text}…"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _figure(grid: Grid) -> str:
    """Return a table of the images in their own size, which the browser enlarges, with names as text."""
    words = [_caption_words(caption) for caption in grid.captions]
    head = "".join(f"<th scope='col'>{escape(name)}<small>{escape(colour)}</small></th>" for name, colour in words)
    body = []
    for row in grid.rows:
        sources = (base64.b64encode(_png(image)).decode() for image in row.images)
        named = zip(sources, grid.captions, strict=True)
        cells = (f'<td><img alt="{escape(name)}" src="data:image/png;base64,{source}"></td>' for source, name in named)
        body.append(
            f"<tr><th scope='row'>{escape(row.title)}<small>{escape(row.subtitle)}</small></th>{''.join(cells)}</tr>"
        )
    table = f"<table class='tiles'><thead><tr><td></td>{head}</tr></thead>{''.join(body)}</table>"
    return f"<figure>{_scrolling(table, 'images')}<figcaption>{escape(grid.note)}</figcaption></figure>"


def _scrolling(table: str, name: str) -> str:
    """Return a table that scrolls sideways where it is wider than the page, with a shadow and words as a cue."""
    return (
        f'<p class="cue">The table continues to the right: scroll it sideways.</p><div class="scroll" tabindex="0"'
        f' role="region" aria-label="Table of {escape(name)}">{table}</div>'
    )


def _panel(svg: str, caption: str, keys: str) -> str:
    return f'<div class="plots"><figure>{svg}{keys}<figcaption>{escape(caption)}</figcaption></figure></div>'


def _continued_plot(rows: Sequence[Row]) -> str:
    """Plot the distance against training steps."""
    curves = {name: training_curve(rows, name) for name in CONTINUED}
    lines = [
        Line(
            LABELS[name],
            COLOURS[name],
            [(step, row["frechet_distance"], row["frechet_low"], row["frechet_high"]) for step, row in curve],
        )
        for name, curve in curves.items()
    ]
    ticks = sorted({step for curve in curves.values() for step, _ in curve})
    level = [("real images", curves["fm"][0][1]["frechet_floor"])]
    return line_plot(lines, "Quality against training steps", "training steps", DISTANCE, ticks, level)


def _continued_legend() -> str:
    return legend([(LABELS[name], COLOURS[name], "") for name in CONTINUED])


def _continued_caption(rows: Sequence[Row]) -> str:
    first = training_curve(rows, "fm")[0][1]
    return (
        f"{first['samples']} images at {first['evaluations']} evaluations, learning rate {first['learning_rate']:g} for"
        f" all; vertical bars are {INTERVAL}s. Where curves coincide, the last one covers the others."
        " The naive LoRA is the paper's baseline: the network is fed the flow"
        " time itself, and learns image - noise."
    )


def _table(header: Sequence[str], body: Sequence[Sequence[str]], marked: Sequence[int], name: str) -> str:
    """Return a table; the rows at the positions `marked` are bold."""
    lines = []
    for position, cells in enumerate(body):
        mark = ' class="best"' if position in marked else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    names = "".join(f"<th>{escape(title)}</th>" for title in header)
    return _scrolling(f"<table><tr>{names}</tr>{''.join(lines)}</table>", name)


def _three_digits(value: float) -> str:
    """Return a number of a table with three digits, zeros at the end included, so that a column lines up."""
    return f"{value:#.3g}".rstrip(".")


def _distance_cells(row: Row) -> list[str]:
    return [
        _three_digits(row["frechet_distance"]),
        f"{_three_digits(row['frechet_low'])} – {_three_digits(row['frechet_high'])}",
        _three_digits(excess(row)),
        f"{row['name_top1']:.1%}",
    ]


def _few_steps_table(rows: Sequence[Row]) -> str:
    """Tabulate every setting of the base, and the reflow LoRA; the best of each number of evaluations is bold."""
    found = sorted(select(rows, "few_steps"), key=lambda row: (_allowed(row), row["network"]))
    body, marked = [], []
    for position, row in enumerate(found):
        same = [other for other in found if _allowed(other) == _allowed(row)]
        if row is best(same):
            marked.append(position)
        guidance = f"{row['guidance_scale']:g}" if row["guidance_scale"] > 1 else "none"
        cells = [LABELS[row["network"]], str(row["evaluations"]), str(row["steps"]), guidance]
        body.append([*cells, *_distance_cells(row), f"{1000 * row['seconds_per_image']:.0f} ms"])
    header = ("network", "evaluations", "steps", "guidance", DISTANCE, INTERVAL, "above real images")
    return _table((*header, "right name first", "time for one image"), body, marked, "the few-step comparison")


def _style_table(rows: Sequence[Row]) -> str:
    """Tabulate base and LoRA on both groups of names."""
    body = [
        [LABELS[row["network"]], row["names"], *_distance_cells(row), f"{row['name_top5']:.1%}"]
        for row in select(rows, "style")
    ]
    header = ("network", "names", DISTANCE, INTERVAL, "above real images", "right name first")
    return _table((*header, "in first five"), body, (), "the second style")
