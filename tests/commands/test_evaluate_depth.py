"""`d2f evaluate --task depth`: the errors of the files that `d2f sample --task depth` writes, and the table."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.commands.evaluate_depth import depth_table
from d2f_fast.commands.main import main


def test_errors_are_those_of_the_predicted_files(
    depth_run: Path, depth_rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "depth", "--model", str(depth_run / "pipeline"), "--num_inference_steps", "2"]
    reference = ["--reference", str(depth_rooms), "--num_samples", "2", "--depth_max", "4"]
    assert main(["evaluate", *options, *reference, "--output_dir", str(tmp_path / "e")]) == 0
    assert "Depth of 2 images at 2 steps, ensemble of 1" in capsys.readouterr().out
    row = json.loads((tmp_path / "e/metrics.json").read_text())["results"][0]
    images = [str(depth_rooms / f"rgb/0000{i}.png") for i in range(2)]
    assert main(["sample", *options, "--image", *images, "--output_dir", str(tmp_path / "s")]) == 0
    errors = []
    for i in range(2):
        depth, prediction = np.load(depth_rooms / f"depth/0000{i}.npy"), np.load(tmp_path / f"s/0000{i}.npy")
        valid = np.isfinite(depth) & (depth <= 4)
        depth, prediction = depth[valid].astype(float), prediction[valid].astype(float)
        scale, shift = np.polyfit(prediction, 1 / depth, 1)  # the model has learned the disparity
        inverse = scale * prediction + shift
        got = np.where(inverse > 0, 1 / np.where(inverse > 0, inverse, 1), np.inf).clip(1e-6, 4)
        errors.append([np.mean(np.abs(got - depth) / depth), np.mean(np.maximum(got / depth, depth / got) < 1.25)])
    for name, expected in zip(("abs_rel", "delta1"), np.mean(errors, axis=0), strict=True):
        assert row[name]["value"] == pytest.approx(expected, abs=1e-6)
        assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert (row["samples"], row["normalization"], row["steps"]) == (2, "disparity", 2)
    assert (row["layout"], row["processing_resolution"]) == ("plain", 16)


def test_data_set_of_the_protocol_sets_range_and_resolution(depth_run: Path, depth_rooms: Path, tmp_path: Path) -> None:
    scene = tmp_path / "scene0406_02"
    for name in ("color", "depth"):
        (scene / name).mkdir(parents=True)
    Image.open(depth_rooms / "rgb/00000.png").save(scene / "color/000300.jpg")
    depth = np.nan_to_num(np.load(depth_rooms / "depth/00000.npy"), posinf=0)
    Image.fromarray((depth * 1000).astype(np.uint16)).save(scene / "depth/000300.png")
    command = ["evaluate", "--task", "depth", "--model", str(depth_run / "pipeline"), "--num_inference_steps", "1"]
    assert main([*command, "--reference", str(tmp_path), "--output_dir", str(tmp_path / "e")]) == 0
    row = json.loads((tmp_path / "e/metrics.json").read_text())["results"][0]
    assert (row["layout"], row["processing_resolution"], row["samples"]) == ("scannet", 0, 1)
    assert np.isfinite(row["abs_rel"]["value"])


def test_table_has_a_line_for_each_error() -> None:
    measure = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {"samples": 3, "steps": 1, "ensemble_size": 1}
    lines = depth_table(row | dict.fromkeys(("abs_rel", "delta1", "rmse", "log10"), measure))
    assert lines[0] == "Depth of 3 images at 1 step, ensemble of 1"
    assert lines[4] == "| AbsRel, lower is better | 0.5000 | 0.2500 to 0.7500 |" and len(lines) == 8


def test_folder_without_depth_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--task", "depth", "--reference", str(tmp_path), "--model", "x", "--dry_run"]) == 2
    assert "holds no images with depth" in capsys.readouterr().err
