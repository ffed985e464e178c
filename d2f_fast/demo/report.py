"""The demo's `report.html`: one file with pictures, plots and tables in it, that opens without a network."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from d2f_fast.demo.plots import COLOURS, Bar, Line, bar_plot, legend, line_plot
from d2f_fast.demo.reading import Row, best, excess, reading, route_of, select
from d2f_fast.demo.sampling import DDIM, DPM, FLOW, FLOW_TRAILING, Route
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
TILE, LABEL_WIDTH, HEADER = 96, 210, 40

STYLE = """
:root { color-scheme: light; --ink: #1d1d24; --soft: #63636e; --rule: #e3e3e8; --paper: #fbfbfa }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
.lead { color: var(--soft); margin: 0 0 1.6rem } .reading { border-left: 3px solid #0b7a75; padding-left: 1rem }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem }
figure > img { max-width: 100%; height: auto; image-rendering: pixelated }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.2rem }
.plots figure { margin: 0; background: #fff; border: 1px solid var(--rule); border-radius: 8px; padding: .8rem }
svg { width: 100%; height: auto } svg text { font: 11.5px system-ui, sans-serif; fill: var(--soft) }
.grid { stroke: #ececf0 } .level { stroke: #b08900; stroke-dasharray: 5 4 } .interval { stroke: #1d1d24 }
.legend { font-size: .85rem; color: var(--soft); margin: .5rem 0 0 }
.legend span { margin-right: 1.1rem; white-space: nowrap }
.key { width: 24px; height: 8px; margin-right: .4rem; vertical-align: middle }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { color: var(--soft); font-weight: 600 } td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
.best { font-weight: 700; color: #0b7a75 } details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
"""


def write_report(
    folder: Path,
    rows: Sequence[Row],
    shown: Mapping[tuple[str, Route, int], Tensor],
    columns: tuple[Sequence[str], Sequence[Image.Image]],
    seed: int,
    seconds: float,
) -> Path:
    """Write the grids as PNG files, and `report.html` with everything inlined.

    Args:
        folder: of both.
        rows: of `metrics.json`.
        shown: pictures [columns, 3, H, W] in [-1, 1] by objective, route and evaluations.
        columns: captions, and the real pictures.
        seed: of the run.
        seconds: that it took.
    """
    evaluations = sorted({steps for _, _, steps in shown})
    middle = 4 if 4 in evaluations else evaluations[0]
    grids = {}
    for steps in evaluations:
        grids[steps] = _png(picture_grid(shown, columns, steps))
        with atomic_path(folder / f"grid-{steps}.png") as temporary:
            temporary.write_bytes(grids[steps])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    sections = [
        "<h1>Diff2Flow on an embedded miniature</h1>",
        f'<p class="lead">One base model, four LoRA runs to a second style of drawing with the same budget, data order'
        f" and seeds. Seed {seed}, {seconds / 60:.1f} minutes, {escape(versions)}.</p>",
        f"<h2>What the numbers say</h2><p class='reading'>{escape(reading(rows, middle))}</p>",
        f"<h2>The same noise, {middle} evaluations</h2>{_figure(grids[middle], middle)}",
        *(f"<details><summary>{n} evaluations</summary>{_figure(grids[n], n)}</details>" for n in grids if n != middle),
        f"<h2>Quality against evaluations</h2>{_quality_plots(rows, evaluations)}",
        f"<h2>Training</h2>{_training_plots(rows)}",
        f"<h2>Grey bias</h2>{_grey_plots(rows)}",
        f"<h2>Every network, every sampler</h2>{_table(rows)}",
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


def picture_grid(
    shown: Mapping[tuple[str, Route, int], Tensor], columns: tuple[Sequence[str], Sequence[Image.Image]], steps: int
) -> Image.Image:
    """Pictures of one number of evaluations: a row for each network and sampler, a column for each caption."""
    captions, real = columns
    rows: list[tuple[str, str, Sequence[Image.Image]]] = [("real pictures", "the style to learn", real)]
    for objective in OBJECTIVES:
        for route in (DDIM, FLOW):
            tensor = shown.get((objective, route, steps))
            if tensor is None:  # it was not measured at this number of evaluations
                continue
            pixels = ((tensor + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            rows.append((LABELS[objective], route.label, [Image.fromarray(picture) for picture in pixels]))
    size = (LABEL_WIDTH + TILE * len(captions), HEADER + TILE * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen, bold, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(11)
    for column, caption in enumerate(captions):
        name, _, background = caption.partition(" on a ")
        words = [name.split(" ", 1)[1], background.removesuffix(" background")]
        for line, text in enumerate(words):
            pen.text((LABEL_WIDTH + column * TILE + 3, 5 + 16 * line), _shorten(text, small), "#63636e", small)
    for row, (title, subtitle, pictures) in enumerate(rows):
        top = HEADER + row * TILE
        pen.text((8, top + 28), title, "#1d1d24", bold)
        pen.text((8, top + 50), subtitle, "#63636e", small)
        for column, picture in enumerate(pictures):
            tile = picture.resize((TILE - 4, TILE - 4), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL_WIDTH + column * TILE + 2, top + 2))
    return sheet


def _shorten(text: str, font: Any) -> str:
    """Cut a text to the width of a tile."""
    if font.getlength(text) <= TILE - 6:
        return text
    while font.getlength(f"{text}…") > TILE - 6:
        text = text[:-1]
    return f"{text}…"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _figure(png: bytes, steps: int) -> str:
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="Pictures of each network and sampler at {steps} evaluations"'
        f' src="data:image/png;base64,{source}"><figcaption>{steps} network evaluations a picture, guidance counted'
        " once; names that finetuning never saw; each column starts from the same noise.</figcaption></figure>"
    )


def _point(x: float, row: Row) -> tuple[float, float, float, float]:
    return x, row["frechet_distance"], row["frechet_low"], row["frechet_high"]


def _panel(svg: str, caption: str, keys: str = "") -> str:
    return f"<figure>{svg}{keys}<figcaption>{escape(caption)}</figcaption></figure>"


def _quality_plots(rows: Sequence[Row], evaluations: Sequence[int]) -> str:
    """Best with best, then each network by each sampler on a common scale of evaluations."""
    labels = ("network evaluations", "Fréchet distance")
    # A single number of evaluations is no curve.
    drawn = [name for name in OBJECTIVES if all(select(rows, "quality", objective=name, steps=n) for n in evaluations)]
    lines = [
        Line(LABELS[name], COLOURS[name], [_point(steps, best(rows, name, steps)) for steps in evaluations])
        for name in drawn
    ]
    floor = select(rows, "autoencoder")[0]
    levels = [("autoencoder", floor["frechet_distance"]), ("real pictures", floor["frechet_floor"])]
    title = "Each network with its best sampler"
    keys = legend([(line.label, line.colour, "") for line in lines])
    panels = [_panel(line_plot(lines, title, *labels, evaluations, levels), f"{title}; bars are 95 % intervals.", keys)]
    for name in drawn:
        lines = []
        for route, dash in DASHES.items():
            found = select(rows, "quality", objective=name, sampler=route.sampler, spacing=route.spacing)
            points = [_point(row["steps"], row) for row in sorted(found, key=lambda row: row["steps"])]
            lines.append(Line(route.label, COLOURS[name], points, dash))
        keys = legend([(route.label, COLOURS[name], dash) for route, dash in DASHES.items()])
        panels.append(
            _panel(line_plot(lines, LABELS[name], *labels, evaluations), f"{LABELS[name]}, by sampler.", keys)
        )
    return f'<div class="plots">{"".join(panels)}</div>'


def _training_plots(rows: Sequence[Row]) -> str:
    """Loss and distance against training steps."""
    curves = {
        name: sorted(select(rows, "training", objective=name), key=lambda row: row["training_steps"])
        for name in OBJECTIVES[1:]
    }
    ticks = sorted({row["training_steps"] for curve in curves.values() for row in curve})
    losses = [
        Line(LABELS[name], COLOURS[name], [(row["training_steps"], *(row["flow_loss"],) * 3) for row in curve])
        for name, curve in curves.items()
    ]
    distances = [
        Line(LABELS[name], COLOURS[name], [_point(row["training_steps"], row) for row in curve])
        for name, curve in curves.items()
    ]
    level = [(f"{LABELS[name]} at the end", curves[name][-1]["frechet_distance"]) for name in ("fm", "fm_paper")]
    routes = ", ".join(f"{LABELS[name]} by {route_of(curve[0]).label}" for name, curve in curves.items())
    count, steps = curves["fm"][0]["samples"], curves["fm"][0]["steps"]
    keys = legend([(LABELS[name], COLOURS[name], "") for name in curves])
    panels = [
        _panel(
            line_plot(losses, "Flow loss against training steps", "training steps", "flow loss", ticks),
            "Mean squared error of the velocity on held-out pictures, the same noise and times for all.",
            keys,
        ),
        _panel(
            line_plot(distances, "Quality against training steps", "training steps", "Fréchet distance", ticks, level),
            f"{count} pictures at {steps} evaluations: {routes}.",
            keys,
        ),
    ]
    return f'<div class="plots">{"".join(panels)}</div>'


def _grey_plots(rows: Sequence[Row]) -> str:
    """Brightness spread of each delivery route, and of a perfect network."""
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
        title = f"Brightness spread, captions with {captions}"
        count, steps = found[0]["samples"], found[0]["steps"]
        words = f"{title}: share of the real pictures' ({count} samples a bar, {steps} evaluations, 95 % intervals)."
        panels.append(_panel(bar_plot(bars, title), words))
    ideal = []
    for row in select(rows, "gaussian_grey_bias"):
        start = "t = 0" if row["start"] == 0 else "stock start"
        cells = (f"{row['latents'][1]} × {row['latents'][2]}", start, str(row["steps"]), f"{row['grey_bias']:.3f}")
        ideal.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = (
        "<p>The share that a perfect network keeps on Gaussian latents whose channel means have variance 1, in closed"
        ' form:</p><div class="scroll"><table><tr><th>latents</th><th>start</th><th>evaluations</th>'
        f"<th>spread kept</th></tr>{''.join(ideal)}</table></div>"
    )
    return f'<div class="plots">{"".join(panels)}</div>{table}'


def _table(rows: Sequence[Row]) -> str:
    """All sampling rows; the smallest distance of each number of evaluations in bold."""
    quality = select(rows, "quality")
    smallest = {
        row["steps"]: min(r["frechet_distance"] for r in quality if r["steps"] == row["steps"]) for row in quality
    }
    body = []
    for row in sorted(quality, key=lambda row: row["steps"]):
        mark = ' class="best"' if row["frechet_distance"] == smallest[row["steps"]] else ""
        interval = f"{row['frechet_low']:.3g} – {row['frechet_high']:.3g}"
        route = route_of(row).label + (" (= DDIM)" if row.get("equal_to") else "")
        cells = [LABELS[row["objective"]], route, str(row["steps"]), str(row["samples"])]
        numbers = [interval, f"{excess(row):.3g}", f"{row['background_accuracy']:.1%}", f"{row['name_top1']:.1%}"]
        body.append(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}<td{mark}>{row['frechet_distance']:.3g}</td>"
            f"{''.join(f'<td>{number}</td>' for number in numbers)}<td>{row['name_top5']:.1%}</td></tr>"
        )
    header = ("network", "sampler", "evaluations", "pictures", "Fréchet distance", "95 %", "above real", "background")
    names = "".join(f"<th>{name}</th>" for name in (*header, "name first", "in first five"))
    return f'<div class="scroll"><table><tr>{names}</tr>{"".join(body)}</table></div>'
