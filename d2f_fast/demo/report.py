"""Write the demo's `report.html`: one file that holds images, plots and tables, and opens without a network."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from d2f_fast.demo.comparisons import best, excess
from d2f_fast.demo.plots import COLOURS, Bar, Line, bar_plot, legend, line_plot
from d2f_fast.demo.rows import Row, sampler_of, select, training_curve
from d2f_fast.demo.samplers import DDIM, DPM, FLOW, FLOW_TRAILING, Sampler
from d2f_fast.demo.summary import summary
from d2f_fast.files.atomic import atomic_path

OBJECTIVES = ("base", "fm_paper", "fm", "diffusion", "diff2flow")
LABELS = {
    "base": "base, untouched",
    "fm_paper": "naive flow LoRA, paper's",
    "fm": "naive flow LoRA",
    "diffusion": "diffusion LoRA",
    "diff2flow": "aligned LoRA",
}
DASHES = {DDIM: "", FLOW: "7 3", FLOW_TRAILING: "2 3", DPM: "8 3 2 3"}
LOSS = "flow loss (lower is better)"
DISTANCE = "Fréchet distance (lower is better)"
TILE, LABEL_WIDTH, HEADER = 96, 210, 40  # pixels

Shown = Mapping[tuple[str, Sampler, int], Tensor]


class GridRow(NamedTuple):
    """A row of an image grid.

    Args:
        title: name of the network.
        subtitle: name of the sampler.
        images: one image for each column.
    """

    title: str
    subtitle: str
    images: Sequence[Image.Image]


class GridColumns(NamedTuple):
    """Columns of an image grid.

    Args:
        captions: caption of each column.
        real: real image of each caption.
    """

    captions: Sequence[str]
    real: Sequence[Image.Image]


STYLE = """
:root { color-scheme: light; --ink: #1d1d24; --soft: #63636e; --rule: #e3e3e8; --paper: #fbfbfa }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
.lead { color: var(--soft); margin: 0 0 1.6rem } .summary { border-left: 3px solid #0b7a75; padding-left: 2rem }
.summary li { margin: .3rem 0 }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem }
.tiles td, .tiles th { padding: 2px; border: 0; white-space: normal; vertical-align: middle }
.tiles thead th { min-width: 4.5rem; vertical-align: bottom; text-align: left; font-weight: 400; font-size: .72rem }
.tiles th[scope=row] { min-width: 6.5rem; text-align: left; color: var(--ink) }
.tiles small { display: block; color: var(--soft); font-weight: 400 }
.tiles img { display: block; width: 100%; min-width: 4.5rem; image-rendering: pixelated }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem }
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
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
.best { font-weight: 700; color: #0b7a75 } details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
"""


def write_report(
    folder: Path, rows: Sequence[Row], shown: Shown, columns: GridColumns, seed: int, seconds: float
) -> Path:
    """Write the image grids as PNG files, and `report.html` with everything inlined.

    Args:
        folder: folder for the files.
        rows: rows of `metrics.json`.
        shown: images [columns, 3, H, W] in [-1, 1] by network, sampler and network evaluations.
        columns: captions and real images of the grids' columns.
        seed: seed of the run.
        seconds: duration of the run.

    Returns:
        Path of `report.html`.
    """
    evaluations = sorted({steps for _, _, steps in shown})
    middle = 4 if 4 in evaluations else evaluations[0]
    grids = {steps: grid_rows(shown, columns, steps) for steps in evaluations}
    for steps, rows_of_images in grids.items():
        with atomic_path(folder / f"grid-{steps}.png") as temporary:
            temporary.write_bytes(_png(image_grid(rows_of_images, columns.captions)))
    statements = "".join(f"<li>{escape(statement)}</li>" for statement in summary(rows, middle))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    sections = [
        "<h1>Diff2Flow on an embedded miniature</h1>",
        '<p class="lead">Four LoRA runs teach one base model a second style of images, with the same number of'
        f" training steps, the same data order and the same seeds. Seed {seed}, {seconds / 60:.1f} minutes,"
        f" {escape(versions)}.</p>",
        f"<h2>Summary</h2><ul class='summary'>{statements}</ul>",
        f"<h2>Images from the same noise, {middle} evaluations</h2>{_figure(grids[middle], columns.captions, middle)}",
        *(
            f"<details><summary>{n} evaluations</summary>{_figure(grids[n], columns.captions, n)}</details>"
            for n in grids
            if n != middle
        ),
        f"<h2>Quality against network evaluations</h2>{_quality_plots(rows, evaluations)}",
        f"<h2>Training</h2>{_training_plots(rows)}",
        f"<h2>Grey bias</h2>{_grey_bias_plots(rows)}",
        f"<h2>Every network with every sampler</h2>{_table(rows)}",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Diff2Flow demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    path = folder / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def grid_rows(shown: Shown, columns: GridColumns, steps: int) -> list[GridRow]:
    """Return the images of one number of evaluations: a row for each network and sampler, real images first."""
    rows = [GridRow("real images", "the style to learn", columns.real)]
    for objective in OBJECTIVES:
        for sampler in (DDIM, FLOW):
            tensor = shown.get((objective, sampler, steps))
            if tensor is None:  # This network is not measured at this number of evaluations.
                continue
            pixels = ((tensor + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            rows.append(GridRow(LABELS[objective], sampler.label, [Image.fromarray(image) for image in pixels]))
    return rows


def image_grid(rows: Sequence[GridRow], captions: Sequence[str]) -> Image.Image:
    """Draw rows of images as one image, with a column for each caption."""
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


def _figure(rows: Sequence[GridRow], captions: Sequence[str], steps: int) -> str:
    """Return a table of the images in their own size, which the browser enlarges, with names as text."""
    words = [_caption_words(caption) for caption in captions]
    head = "".join(f"<th scope='col'>{escape(name)}<small>{escape(colour)}</small></th>" for name, colour in words)
    body = []
    for row in rows:
        sources = (base64.b64encode(_png(image)).decode() for image in row.images)
        named = zip(sources, captions, strict=True)
        cells = (f'<td><img alt="{escape(name)}" src="data:image/png;base64,{source}"></td>' for source, name in named)
        body.append(
            f"<tr><th scope='row'>{escape(row.title)}<small>{escape(row.subtitle)}</small></th>{''.join(cells)}</tr>"
        )
    table = f"<table class='tiles'><thead><tr><td></td>{head}</tr></thead>{''.join(body)}</table>"
    return (
        f"<figure>{_scrolling(table, f'images at {steps} evaluations')}<figcaption>Each image took {steps} network"
        " evaluations, guidance counted once. Finetuning never saw these names. All images of a column start from the"
        " same noise.</figcaption></figure>"
    )


def _scrolling(table: str, name: str) -> str:
    """Return a table that scrolls sideways where it is wider than the page, with a shadow and words as a cue."""
    return (
        f'<p class="cue">The table continues to the right: scroll it sideways.</p><div class="scroll" tabindex="0"'
        f' role="region" aria-label="Table of {escape(name)}">{table}</div>'
    )


def _point(x: float, row: Row) -> tuple[float, float, float, float]:
    return x, row["frechet_distance"], row["frechet_low"], row["frechet_high"]


def _panel(svg: str, caption: str, keys: str = "") -> str:
    return f"<figure>{svg}{keys}<figcaption>{escape(caption)}</figcaption></figure>"


def _quality_plots(rows: Sequence[Row], evaluations: Sequence[int]) -> str:
    """Plot each network with its best sampler, then each network with every sampler."""
    labels = ("network evaluations", DISTANCE)
    # A network that is measured at a single number of evaluations has no curve.
    curves = [name for name in OBJECTIVES if all(select(rows, "quality", objective=name, steps=n) for n in evaluations)]
    lines = [
        Line(LABELS[name], COLOURS[name], [_point(steps, best(rows, name, steps)) for steps in evaluations])
        for name in curves
    ]
    floor = select(rows, "autoencoder")[0]
    levels = [("autoencoder", floor["frechet_distance"]), ("real images", floor["frechet_floor"])]
    title = "Each network with its best sampler"
    keys = legend([(line.label, line.colour, "") for line in lines])
    panels = [
        _panel(
            line_plot(lines, title, *labels, evaluations, levels), f"{title}; vertical bars are 95 % intervals.", keys
        )
    ]
    for name in curves:
        lines = []
        for sampler, dash in DASHES.items():
            found = select(rows, "quality", objective=name, sampler=sampler.name, spacing=sampler.spacing)
            points = [_point(row["steps"], row) for row in sorted(found, key=lambda row: row["steps"])]
            lines.append(Line(sampler.label, COLOURS[name], points, dash))
        keys = legend([(sampler.label, COLOURS[name], dash) for sampler, dash in DASHES.items()])
        panels.append(
            _panel(line_plot(lines, LABELS[name], *labels, evaluations), f"{LABELS[name]}, with each sampler.", keys)
        )
    return f'<div class="plots">{"".join(panels)}</div>'


def _training_plots(rows: Sequence[Row]) -> str:
    """Plot loss and distance against training steps."""
    curves = {name: training_curve(rows, name) for name in OBJECTIVES[1:]}
    ticks = sorted({step for curve in curves.values() for step, _ in curve})
    losses = [
        Line(LABELS[name], COLOURS[name], [(step, *(row["flow_loss"],) * 3) for step, row in curve])
        for name, curve in curves.items()
    ]
    distances = [
        Line(LABELS[name], COLOURS[name], [_point(step, row) for step, row in curve]) for name, curve in curves.items()
    ]
    level = [(f"{LABELS[name]} at the end", curves[name][-1][1]["frechet_distance"]) for name in ("fm", "fm_paper")]
    samplers = "; ".join(f"{LABELS[name]} with {sampler_of(curve[0][1]).label}" for name, curve in curves.items())
    first = curves["fm"][0][1]
    keys = legend([(LABELS[name], COLOURS[name], "") for name in curves])
    panels = [
        _panel(
            line_plot(losses, "Flow loss against training steps", "training steps", LOSS, ticks),
            "Mean squared error of the velocity on held-out images, with the same noise and times for all networks.",
            keys,
        ),
        _panel(
            line_plot(distances, "Quality against training steps", "training steps", DISTANCE, ticks, level),
            f"{first['samples']} images at {first['steps']} evaluations: {samplers}.",
            keys,
        ),
    ]
    return f'<div class="plots">{"".join(panels)}</div>'


def _grey_bias_plots(rows: Sequence[Row]) -> str:
    """Plot the spread of brightness of each network from each start, and tabulate that of a perfect network."""
    panels = []
    for captions in ("no colour", "black and white"):
        found = select(rows, "grey_bias", captions=captions)
        bars = [
            Bar(
                f"{LABELS[row['objective']]}, {'t = 0' if row['start'] == 0 else 'DDIM'}",
                COLOURS[row["objective"]],
                row["grey_bias"],
                row["grey_bias_low"],
                row["grey_bias_high"],
            )
            for row in found
        ]
        title = f"Spread of brightness, captions with {captions}"
        count, steps = found[0]["samples"], found[0]["steps"]
        words = (
            f"{title}, as a fraction of the real images' spread ({count} images for each bar, {steps} evaluations,"
            " 95 % intervals). 1 is best."
        )
        panels.append(_panel(bar_plot(bars, title), words))
    return f'<div class="plots">{"".join(panels)}</div>{_ideal_brightness_table(rows)}'


def _ideal_brightness_table(rows: Sequence[Row]) -> str:
    """Tabulate the spread of brightness that a perfect network keeps."""
    body = []
    for row in select(rows, "gaussian_grey_bias"):
        start = "t = 0" if row["start"] == 0 else "stock start"
        cells = (f"{row['latents'][1]} × {row['latents'][2]}", start, str(row["steps"]), f"{row['grey_bias']:.3f}")
        body.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        "<p>Fraction of the spread that a perfect network keeps for Gaussian latents whose channel means have variance"
        " 1, computed in closed form; 1 is best:</p>"
        + _scrolling(
            "<table><tr><th>latents</th><th>start</th><th>evaluations</th><th>spread kept</th></tr>"
            f"{''.join(body)}</table>",
            "the spread that a perfect network keeps",
        )
    )


def _table(rows: Sequence[Row]) -> str:
    """Tabulate the quality of every network with every sampler; the smallest distances are bold."""
    quality = select(rows, "quality")
    smallest = {
        row["steps"]: min(r["frechet_distance"] for r in quality if r["steps"] == row["steps"]) for row in quality
    }
    body = []
    for row in sorted(quality, key=lambda row: row["steps"]):
        mark = ' class="best"' if row["frechet_distance"] == smallest[row["steps"]] else ""
        interval = f"{row['frechet_low']:.3g} – {row['frechet_high']:.3g}"
        sampler = sampler_of(row).label + (" (same as DDIM)" if "equal_to" in row else "")
        cells = [LABELS[row["objective"]], sampler, str(row["steps"]), str(row["samples"])]
        numbers = [interval, f"{excess(row):.3g}", f"{row['background_accuracy']:.1%}", f"{row['name_top1']:.1%}"]
        body.append(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}<td{mark}>{row['frechet_distance']:.3g}</td>"
            f"{''.join(f'<td>{number}</td>' for number in numbers)}<td>{row['name_top5']:.1%}</td></tr>"
        )
    header = ("network", "sampler", "evaluations", "images", DISTANCE, "95 % interval", "above real images")
    accuracies = ("right background", "name first", "name in first five")
    names = "".join(f"<th>{name}</th>" for name in (*header, *accuracies))
    return _scrolling(f"<table><tr>{names}</tr>{''.join(body)}</table>", "every network with every sampler")
