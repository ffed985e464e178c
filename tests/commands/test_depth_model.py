"""Models that predict depth: which are refused before they are loaded."""

import json
from pathlib import Path

import pytest

from d2f_fast.commands import depth_model
from d2f_fast.commands.depth_model import check_depth_model, check_ensemble, load_depth_model
from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.options import ModelOptions


def test_folder_of_another_program_says_its_normalisation(depth_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for path in (depth_run / "pipeline").iterdir():
        if path.name != "d2f.json":
            (folder / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    for prediction, normalization in (("depth", "affine"), ("disparity", "disparity")):
        (folder / "model_index.json").unlink()
        (folder / "model_index.json").write_text(json.dumps(index | {"prediction_type": prediction}))
        loaded = load_depth_model(str(folder), (), ModelOptions(), "flow")
        assert loaded.normalization == normalization
        assert type(loaded.pipeline.scheduler).__name__ == "Diff2FlowScheduler"


def test_model_that_sees_no_image_is_refused(tiny_folder: Path, depth_run: Path) -> None:
    with pytest.raises(ModelError, match="is a text-to-image model, which sees no image"):
        check_depth_model(str(tiny_folder), (), ModelOptions())
    check_depth_model(str(tiny_folder), ("a.safetensors",), ModelOptions())
    check_depth_model(str(depth_run / "pipeline"), (), ModelOptions())


def test_ensemble_without_scipy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ensemble(3)
    monkeypatch.setattr(depth_model, "find_spec", lambda name: None)
    check_ensemble(1)
    with pytest.raises(RefusedInputError, match="ensemble_size needs SciPy, which is not installed: pip install scipy"):
        check_ensemble(3)
