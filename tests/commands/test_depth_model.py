"""Models that predict depth, loaded from the folders of this and of another program."""

import json
from pathlib import Path

from d2f_fast.commands.depth_model import load_depth_model
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


def test_lora_decides_whether_a_model_starts_from_zeros(depth_run: Path, jump_run: Path) -> None:
    for model, lora, from_zeros, steps in ((depth_run, jump_run, True, 1), (jump_run, depth_run, False, 4)):
        loaded = load_depth_model(str(model / "pipeline"), (str(lora),), ModelOptions(), "saved")
        assert loaded.starts_from_zeros is from_zeros and loaded.pipeline.default_denoising_steps == steps
