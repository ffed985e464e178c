"""Models that predict depth, loaded from the folders of this and of another program."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MarigoldDepthPipeline
from PIL import Image

from d2f_fast.commands.depth_checks import depth_tags
from d2f_fast.commands.depth_model import load_depth_model
from d2f_fast.commands.depth_sampling import DepthSampling
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.save import stock_flow_scheduler


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


def test_folder_that_diffusers_saved_again_still_starts_from_zeros(
    depth_run: Path, jump_run: Path, tmp_path: Path
) -> None:
    MarigoldDepthPipeline.from_pretrained(jump_run / "pipeline").save_pretrained(tmp_path)
    assert not (tmp_path / "d2f.json").exists()
    assert depth_tags(str(tmp_path), ()) == {"d2f.task": "depth", "d2f.start": "zeros"}
    for lora, from_zeros, steps in (((), True, 1), ((str(depth_run),), False, 4)):
        loaded = load_depth_model(str(tmp_path), lora, ModelOptions(), "saved")
        assert loaded.starts_from_zeros is from_zeros and loaded.pipeline.default_denoising_steps == steps


def test_hub_id_has_the_start_and_the_normalisation_of_its_folder(
    jump_run: Path, cached_as: Callable[[str, Path], Path]
) -> None:
    tags = cached_as("me/one-step", jump_run / "pipeline") / "d2f.json"
    for normalization in ("log", None):
        if normalization is None:
            tags.unlink()  # as in a copy that diffusers saved again
        else:
            tags.write_text(json.dumps(json.loads(tags.read_text()) | {"d2f.depth_normalization": normalization}))
        loaded = DepthSampling("me/one-step").load()
        assert loaded.starts_from_zeros and loaded.pipeline.default_denoising_steps == 1
        assert loaded.normalization == (normalization or "affine")
    sentence = "me/one-step was trained to jump from zeros in one step, got num_inference_steps 4: leave num_inf"
    with pytest.raises(RefusedInputError, match=sentence):
        DepthSampling("me/one-step", num_inference_steps=4).load()


def test_network_of_the_flow_jumps_from_exactly_the_start_that_was_trained(jump_run: Path, tmp_path: Path) -> None:
    stock = MarigoldDepthPipeline.from_pretrained(jump_run / "pipeline", scheduler=stock_flow_scheduler(1000, 1.0))
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    given = {"num_inference_steps": 1, "latents": torch.zeros(1, 4, 8, 8)}
    inexact = stock(image, **given).prediction[0, ..., 0]
    stock.scheduler = FlowMatchEulerDiscreteScheduler()
    expected = stock(image, **given).prediction[0, ..., 0]
    got = load_depth_model(str(tmp_path), (), ModelOptions(), "saved").predict(image).values
    assert np.abs(got - expected).max() <= 1e-5 < np.abs(inexact - expected).max()
