"""Test a small demo from end to end."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from d2f_fast.demo.run import forward_passes, run_demo
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.miniature.classifier import Classifier


def test_demo_writes_report_grid_metrics_and_lora(
    load: Callable[[], Any], tmp_path: Path, adapted: tuple[Any, dict[str, Path]]
) -> None:
    settings = DemoSettings(
        own_steps=3,
        own_images=4,
        curve_points=(0, 1, 2),
        images=10,
        reference_images=40,
        curve_evaluations=2,
        batch_size=2,
        rank=2,
        evaluations=(1, 2, 5),
        style_images=10,
        style_evaluations=4,
        bootstrap_repeats=5,
    )
    folder = tmp_path / "demo"
    report = run_demo(folder, 3, settings, load, Classifier().eval(), adapted[1]["kohya"])
    assert report == folder / "report.html"
    page = report.read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == [
        "The same weights, the same images",
        "Training further on the base&#x27;s own style, 2 steps",
        "Few steps",
        "Learning a second style, 2 steps",
    ]
    assert page.count("class='reading'") == 4 and "Fréchet distance (lower is better)" in page
    assert page.count("95\N{NO-BREAK SPACE}% interval") == 3
    assert '<meta name="viewport" content="width=device-width' in page
    assert page.count('class="scroll"') == page.count('class="cue"') == 5 + 2
    tables = re.findall("<table class='tiles'>.*?</table>", page)
    columns, rows = zip(*((t.count("scope='col'"), t.count("scope='row'")) for t in tables), strict=True)
    assert rows == (3, 1 + 3 * 2, 2 * 3, 3, 3)
    assert page.count("data:image/png;base64,") == sum(c * r for c, r in zip(columns, rows, strict=True))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page)  # Neither a measure nor a coordinate is nan.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["command"], metrics["seed"]) == ("d2f demo", 3)
    found = metrics["results"]
    assert Counter(row["section"] for row in found) == {"same_images": 1, "continued": 9, "few_steps": 8, "style": 4}
    few_steps = {
        (r["network"], r["steps"], r["evaluations"], r["allowed"]) for r in found if r["section"] == "few_steps"
    }
    assert few_steps == {
        *(("base", steps, steps, steps) for steps in (1, 2, 5)),
        *(("base", steps, 2 * steps, allowed) for steps, allowed in ((1, 2), (2, 5))),
        *(("reflow", steps, steps, steps) for steps in (1, 2, 5)),
    }
    untrained = {r["network"]: r["frechet_distance"] for r in found if r.get("training_steps") == 0}
    assert untrained["diff2flow"] == pytest.approx(untrained["diffusion"], rel=1e-4)
    assert untrained["fm"] != pytest.approx(untrained["diffusion"], rel=1e-3)
    assert {r["network"]: r.get("fm_form") for r in found if r["section"] == "continued"} == {
        "fm": "published",
        "diffusion": None,
        "diff2flow": None,
    }
    with Image.open(folder / "few-steps.png") as grid:
        assert grid.size == (210 + 96 * columns[2], 40 + 96 * 4)
    assert load_file(folder / "style" / LORA_FILE)
    load().load_lora_weights(folder / "style")
    expected = 3 * 2 * 3 * 4 + 3 * 3 * 2 * 10 + (2 * (1 + 2 + 5) + 2 + 4) * 10 + 2 * 2 * 4 * 10
    assert forward_passes(settings) == expected
