"""Models and LoRA that predict no depth are refused before they are loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from d2f_fast.commands import depth_checks
from d2f_fast.commands.depth_checks import check_depth_model, check_ensemble, depth_tags
from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.options import ModelOptions


@pytest.mark.parametrize(
    ("entry", "value", "sentence"),
    [
        ("d2f.task", "text", "was not trained on depth: give what d2f train --task depth made"),
        (
            "d2f.depth_normalization",
            "other",
            "d2f.depth_normalization must be affine, log, disparity, got other: train",
        ),
        (
            "d2f.resolution",
            "wide",
            r"d2f.resolution must be a size in pixels, such as 64 or .*, got wide: correct the entry",
        ),
    ],
)
def test_tags_that_do_not_fit_a_model_of_depth_are_refused(
    entry: str, value: str, sentence: str, tmp_path: Path
) -> None:
    assert depth_tags(str(tmp_path), ()) == {}  # a folder of another program
    tags = {"d2f.task": "depth", "d2f.depth_normalization": "log", "d2f.resolution": "64"}
    (tmp_path / "d2f.json").write_text(json.dumps(tags))
    assert depth_tags(str(tmp_path), ()) == tags
    (tmp_path / "d2f.json").write_text(json.dumps(tags | {entry: value}))
    with pytest.raises(ModelError, match=sentence):
        depth_tags(str(tmp_path), ())


def test_lora_without_tags_leaves_those_of_a_model_of_depth(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text(json.dumps({"d2f.task": "depth"}))
    save_file({"a": np.zeros(1, "f4")}, tmp_path / "style.safetensors")
    assert depth_tags(str(tmp_path), (str(tmp_path / "style.safetensors"),)) == {"d2f.task": "depth"}


def test_model_that_sees_no_image_is_refused(tiny_folder: Path, depth_run: Path) -> None:
    with pytest.raises(ModelError, match="is a text-to-image model, which sees no image"):
        check_depth_model(str(tiny_folder), (), ModelOptions())
    check_depth_model(str(tiny_folder), (str(depth_run),), ModelOptions())
    check_depth_model(str(depth_run / "pipeline"), (), ModelOptions())


def test_ensemble_without_scipy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ensemble(3)
    monkeypatch.setattr(depth_checks, "find_spec", lambda name: None)
    check_ensemble(1)
    with pytest.raises(RefusedInputError, match="ensemble_size needs SciPy, which is not installed: pip install scipy"):
        check_ensemble(3)
