"""Print the rows that benchmarks wrote, and draw them as bar charts.

    python -m benchmarks.report                      # the rows in benchmarks/results
    python -m benchmarks.report FOLDER --charts docs

Only the newest row of each case and provider counts. Bars are medians. The line across a bar spans the 20th to the 80th
percentile, or the fastest to the slowest image. Our bars are green, and the dashed line marks the first of them.
"""

import argparse
import csv
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks import clock
from d2f_fast.demo.plots import WIDTH, Bar, bar_plot

Row = dict[str, str]
KEYS = ("benchmark", "case", "steps", "provider", "pass", "timing")
MEASURED_ON = ("date", "commit", "device", "torch", "triton", "threads", "clock_mhz")
TIMES = (
    ("median_ms", "p20_ms", "p80_ms"),
    ("median_us", "p20_us", "p80_us"),
    ("picture_ms", "fastest_ms", "slowest_ms"),
)
STYLE = (
    "svg{font:11px sans-serif;fill:#333;background:#fff}.title{font-weight:bold}.grid{stroke:#ddd}"
    ".level{stroke:#333;stroke-dasharray:4 3}.interval{stroke:#333}"
)


def newest(path: Path) -> list[Row]:
    """Return the last row of each case and provider of a table, in the order of their first rows."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list({tuple(row.get(key, "") for key in KEYS): row for row in rows}.values())


def print_tables(folder: Path) -> None:
    """Print the newest rows of every table in a folder, except the hundreds of rows of a tuning."""
    for path in sorted(folder.glob("*.csv")):
        rows = newest(path)
        if "provider" not in rows[0]:
            continue
        name = next((name for name in clock.SHOWN if name and path.stem.endswith(name)), "")
        columns = [column for column in rows[0] if column not in MEASURED_ON]
        shown = clock.SHOWN[name] if name or "benchmark" in rows[0] else columns
        print(f"\n{path.name}: {', '.join(f'{key} {rows[-1][key]}' for key in MEASURED_ON[1:6])}")
        clock.print_table(rows, shown)


def bars_of(rows: Sequence[Row]) -> tuple[list[Bar], float, str]:
    """Return the bars of one case's rows, the median of our first row (0 without one), and the unit."""
    times = next(names for names in TIMES if names[0] in rows[0])
    bars, level = [], 0.0
    for row in rows:
        ours = row["provider"].startswith(("d2f_fast", "split", "onnx_"))
        colour = "#0b7a75" if ours else "#7a7a85" if row["provider"] in ("base", "base only") else "#3d5a98"
        bars.append(Bar(row["provider"], colour, *(float(row[name]) for name in times)))
        level = level or (bars[-1].value if ours else 0.0)
    return bars, level, times[0].rpartition("_")[2].replace("us", "µs")


def chart(rows: Sequence[Row], title: str) -> str:
    """Return the text of an SVG file with a panel of bars for each case."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        steps = f"{row['steps']} steps" if row.get("steps") else ""
        name = " ".join(filter(None, (row["case"], steps, row.get("pass"), row.get("timing"))))
        panels.setdefault(name, []).append(row)
    parts, top = [f'<text class="title" x="4" y="14">{escape(title)}</text>'], 22
    for name, group in panels.items():
        bars, level, unit = bars_of(group)
        height = 26 * len(bars) + 34
        panel = bar_plot(bars, name, level, left=290)
        parts.append(f'<text x="4" y="{top + 14}">{escape(name)}, {unit}</text>')
        parts.append(panel.replace("<svg ", f'<svg y="{top + 18}" width="{WIDTH}" height="{height}" ', 1))
        top += height + 26
    size = f'viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(parts)}</svg>\n'


def write_charts(folder: Path, charts: Path) -> list[Path]:
    """Write a chart of each benchmark in each table that has medians, and return the paths.

    Args:
        folder: folder of the tables.
        charts: folder of the charts.
    """
    written = []
    for path in sorted(folder.glob("*.csv")):
        timed = [row for row in newest(path) if any(row.get(names[0]) for names in TIMES)]
        for benchmark in dict.fromkeys(row.get("benchmark", "") for row in timed):
            rows = [row for row in timed if row.get("benchmark", "") == benchmark]
            if "provider" not in rows[0]:
                continue
            name = "-".join(filter(None, (path.stem, re.sub(r"[^a-z0-9]+", "-", benchmark))))
            written.append(charts / f"{name}.svg")
            spread = "fastest to slowest" if "picture_ms" in rows[0] else "20th to 80th percentile"
            title = f"{benchmark or path.stem}, {rows[-1]['device']}: medians, {spread}"
            written[-1].write_text(chart(rows, title))
    return written


def main() -> None:
    """Print the tables, write the charts, and print the charts' paths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=clock.RESULTS, help="folder of the tables (default: benchmarks/results)"
    )
    parser.add_argument("--charts", type=Path, help="folder to which charts are written (default: that of the tables)")
    options = parser.parse_args()
    print_tables(options.folder)
    for path in write_charts(options.folder, options.charts or options.folder):
        print(path)


if __name__ == "__main__":
    main()
