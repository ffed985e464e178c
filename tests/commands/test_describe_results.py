"""`d2f inspect` of an export, a checkpoint and pairs, from the files that describe them."""

import json
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.commands.describe_results import describe_checkpoint, describe_export, describe_pairs
from d2f_fast.commands.inspect import describe
from d2f_fast.errors import CheckpointError

RECORD = {"num_pairs": 5, "pairs_per_shard": 2, "solver": "euler", "guidance_scale": 2.0, "guidance_scale_max": 4.0}


def write(path: Path, content: Any) -> Path:
    """Write a JSON file, and return its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path.parent


def test_export_says_its_steps_and_its_guidance(tmp_path: Path) -> None:
    report = {"model": "miniature", "guidance": True, "recommended_guidance": 1.0, "verified": False, "shift": 2.0}
    report["recommended_steps"] = 1
    write(tmp_path / "export.json", report)
    write(tmp_path / "model_index.json", {})
    write(tmp_path / "unet" / "steps.json", {"1": {}, "4": {}})
    found = describe(tmp_path)
    assert (found["kind"], found["model"], found["steps"]) == ("ONNX export", "miniature", "1, 4; 1 recommended")
    assert found["guidance"] == "built into the sampler, 1.0 recommended"
    assert found["odd"] == ["its graphs were not compared with torch"] and "--onnx" in found["needs"][0]


def test_pairs_say_which_shards_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "pairs.json", RECORD)
    (tmp_path / "000000.tar").touch()
    found = describe(tmp_path)
    assert (found["pairs"], found["shards"], found["guidance"]) == (5, "1 of 3", "2.0 to 4.0")
    assert found["odd"] == ["2 shards are missing: the same command of d2f pairs goes on"]


def test_pairs_without_their_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="says no number of pairs"):
        describe_pairs(write(tmp_path / "pairs.json", RECORD | {"pairs_per_shard": "2"}))


def test_checkpoint_says_its_step(tmp_path: Path) -> None:
    write(tmp_path / "manifest.json", {"step": 7})
    found = describe_checkpoint(tmp_path)
    assert found["step"] == 7 and found["results"] == {} and "--resume_from_checkpoint" in found["needs"][0]


@pytest.mark.parametrize(
    ("describe_folder", "name"),
    [(describe_export, "export.json"), (describe_checkpoint, "manifest.json"), (describe_pairs, "pairs.json")],
)
def test_damaged_description_is_refused(describe_folder: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path / name, [1])
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        describe_folder(tmp_path)
