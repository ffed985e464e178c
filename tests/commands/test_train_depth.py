"""`d2f train --task depth`: what a run writes, and options that are refused."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2f_fast.commands.main import main


def test_run_writes_a_lora_a_stock_folder_and_how_to_use_them(depth_run: Path) -> None:
    index = json.loads((depth_run / "pipeline/model_index.json").read_text())
    assert index["_class_name"] == "MarigoldDepthPipeline" and index["prediction_type"] == "disparity"
    assert json.loads((depth_run / "pipeline/unet/config.json").read_text())["in_channels"] == 8
    assert (depth_run / "pytorch_lora_weights.safetensors").is_file() and not list(depth_run.glob("*_kohya*"))
    card = (depth_run / "README.md").read_text()
    assert "pipeline_tag: depth-estimation" in card and "## Predict depth in four steps" in card
    assert "d2f sample --task depth --model run/pipeline --image IMAGE --num_inference_steps 4`" in card
    assert "depth = pipe(IMAGE, num_inference_steps=4, generator=torch.manual_seed(0)).prediction" in card
    config = json.loads((depth_run / "config.json").read_text())
    assert config["depth_normalization"] == "disparity" and config["first_last_layers"] is True
    assert json.loads((depth_run / "metrics.json").read_text())["results"][0]["steps"] == 2


def test_run_that_learns_one_step_from_zeros_says_how_to_use_it(jump_run: Path) -> None:
    assert json.loads((jump_run / "pipeline/model_index.json").read_text())["default_denoising_steps"] == 1
    assert not list(jump_run.glob("*_kohya*"))
    card = (jump_run / "README.md").read_text()
    assert "## Predict depth in one step" in card and "| start | zeros in place of noise, one step |" in card
    assert "d2f sample --task depth --model run/pipeline --image IMAGE --num_inference_steps 1`" in card
    assert "depth = pipe(IMAGE, num_inference_steps=1, latents=latents).prediction" in card
    assert "latents = torch.zeros(1, pipe.vae.config.latent_channels, *sides)" in card


@pytest.mark.parametrize("fixture", ["depth_run", "jump_run"])
def test_lines_of_the_card_give_the_depth_of_d2f_sample(
    fixture: str,
    request: pytest.FixtureRequest,
    run_card: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Path = request.getfixturevalue(fixture)
    monkeypatch.chdir(run.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (17, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    card, steps = (run / "README.md").read_text(), 4 if fixture == "depth_run" else 1
    command = re.search("`d2f (sample .*?)`", card)
    assert command is not None
    arguments = shlex.split(command[1].replace("IMAGE", shlex.quote(str(tmp_path / "a.png"))))
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert f"d2f: num_inference_steps {steps}, as given\n" in capsys.readouterr().err
    (found,) = run_card(card, IMAGE=Image.fromarray(pixels))
    assert np.abs(found["depth"][0, ..., 0] - np.load(tmp_path / "a.npy")).max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "task depth needs --train_data_dir, a folder of images with their depth"),
        (["--train_data_dir", "DATA", "--caption_dropout", "0.1"], "caption_dropout has no effect with --task depth"),
        (["--train_data_dir", "DATA", "--caption_column", "a"], "caption_column has no effect with --task depth"),
        (["--train_data_dir", "DATA", "--depth_scale", "-1"], "depth_scale must be positive and finite"),
        (["--train_data_dir", "DATA", "--teacher", "base"], "teacher does not go with --task depth: leave it out"),
        (
            ["--train_data_dir", "DATA", "--distill", "--sampling_shift", "2"],
            "sampling_shift has no effect with distill on depth, which is then predicted in one step, got 2.0: leave",
        ),
        (
            ["--train_data_dir", "DATA", "--distill", "--lora_format", "kohya"],
            "lora_format kohya is for programs that start from noise, and distill on depth starts from zeros: leave",
        ),
        (["--train_data_dir", "DATA", "--distill", "--flow_shift", "2"], "flow_shift has no effect with distill"),
        (["--train_data_dir", "DATA/rgb"], "holds no images with depth: expected the sub-folders rgb and depth"),
        (["--train_data_dir", "DATA", "--pairs", "DATA"], "give either --train_data_dir or --pairs"),
    ],
)
def test_options_that_do_not_go_with_depth_are_refused(
    options: list[str], sentence: str, depth_rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("DATA", str(depth_rooms)) for word in options]
    assert main(["train", "--task", "depth", *words, "--output_dir", str(tmp_path / "x"), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_options_of_depth_need_its_task(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--train_data_dir", str(images), "--depth_normalization", "log", "--dry_run"]) == 2
    assert "depth_normalization needs --task depth: add it, or leave the option out" in capsys.readouterr().err


def test_several_folders_are_mixed_by_weight(
    depth_rooms: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(depth_rooms, tmp_path / "other"))
    folders = ["--train_data_dir", str(depth_rooms), str(other)]
    command = ["train", "--task", "depth", *folders, "--dataset_weights", "5", "1"]
    assert main([*command[:-1], "--dry_run"]) == 2
    assert "dataset_weights: 1 for 2 data sets: give several folders after" in capsys.readouterr().err
    options = ["--pretrained_model_name_or_path", str(tiny_folder), "--resolution", "16", "--max_train_steps", "1"]
    assert main([*command, *options, "--output_dir", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().err.splitlines()
    for folder, count in ((depth_rooms, 10), (other, 2)):
        assert f"d2f: depth is learned from {folder} (layout plain, normalisation affine)" in lines
        assert f"d2f: {folder} has 6 images, and an epoch takes {count} from it" in lines
    assert json.loads((tmp_path / "run/config.json").read_text())["dataset_weights"] == [5.0, 1.0]
    more = [*options, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest", "--dry_run"]
    assert main([*command, *more]) == 0
    capsys.readouterr()
    assert main([*command[:-2], "3", "1", *more]) == 2
    assert "dataset_weights was '5.0, 1.0' and is now '3.0, 1.0'" in capsys.readouterr().err


def test_damaged_depth_stops_the_run_in_one_line_that_names_the_file(
    depth_rooms: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rgb", "depth"):
        (tmp_path / name).mkdir()
    (tmp_path / "rgb/a.png").write_bytes((depth_rooms / "rgb/00000.png").read_bytes())
    (tmp_path / "depth/a.npy").write_bytes(b"damaged")
    paths = ["--train_data_dir", str(tmp_path), "--pretrained_model_name_or_path", str(tiny_folder)]
    options = ["--resolution", "16", "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    assert main(["train", "--task", "depth", *paths, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a.npy cannot be read as a depth map" in error


def test_result_of_another_run_is_not_replaced(
    depth_rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline").mkdir()
    words = ["--train_data_dir", str(depth_rooms), "--output_dir", str(tmp_path), "--dry_run"]
    assert main(["train", "--task", "depth", *words]) == 2
    assert "pipeline exists: continue its run with --resume_from_checkpoint latest" in capsys.readouterr().err
