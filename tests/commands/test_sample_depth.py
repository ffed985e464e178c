"""`d2f sample --task depth`: its files, the depth of stock diffusers, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MarigoldDepthPipeline
from PIL import Image

from d2f_fast.commands.main import main


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Image that is neither square nor of the processing resolution."""
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def sample(picture: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that predicts the depth of the image with more options, and returns the exit code."""
    return lambda *more, image=str(picture), output="out": main(
        ["sample", "--task", "depth", "--image", image, "--output_dir", str(tmp_path / output), *more]
    )


def test_depth_is_that_of_the_saved_folder_in_stock_diffusers(
    sample: Callable[..., int], depth_run: Path, picture: Path, tmp_path: Path
) -> None:
    assert sample("--model", str(depth_run / "pipeline"), "--seed", "3") == 0
    stock = MarigoldDepthPipeline.from_pretrained(depth_run / "pipeline")
    stock.set_progress_bar_config(disable=True)
    with Image.open(picture) as image:
        expected = stock(image.convert("RGB"), generator=torch.Generator().manual_seed(3)).prediction[0, ..., 0]
    values = np.load(tmp_path / "out/a.npy")
    assert values.shape == (21, 34) and values.dtype == np.float32
    assert np.abs(values - expected).max() <= 1e-5
    with Image.open(tmp_path / "out/a_16bit.png") as deep:
        assert deep.mode == "I;16" and np.abs(np.asarray(deep) / 65535 - values).max() <= 1e-5
    with Image.open(tmp_path / "out/a_preview.png") as preview:
        assert preview.mode == "RGB" and preview.size == (34, 21)
    row = json.loads((tmp_path / "out/metrics.json").read_text())["results"][0]
    assert (row["task"], row["steps"], row["normalization"]) == ("depth", 4, "disparity")
    assert row["files"] == ["a.npy", "a_16bit.png", "a_preview.png"]


def test_lora_on_its_base_gives_the_depth_of_the_saved_folder(
    sample: Callable[..., int], depth_run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert sample("--model", str(depth_run / "pipeline"), output="folder") == 0
    assert sample("--model", str(tiny_folder), "--lora", str(depth_run), output="lora") == 0
    values = [np.load(tmp_path / name / "a.npy") for name in ("folder", "lora")]
    assert np.abs(values[0] - values[1]).max() <= 1e-5


def test_model_that_starts_from_zeros_is_sampled_in_one_step_without_an_option(
    sample: Callable[..., int], jump_run: Path, tiny_folder: Path, picture: Path, tmp_path: Path
) -> None:
    assert sample("--model", str(jump_run / "pipeline"), output="folder") == 0
    on_base = ["--model", str(tiny_folder), "--lora", str(jump_run), "--seed", "5", "--sampler", "flow"]
    assert sample(*on_base, output="lora") == 0
    stock = MarigoldDepthPipeline.from_pretrained(jump_run / "pipeline")
    stock.set_progress_bar_config(disable=True)
    with Image.open(picture) as image:  # It is processed at 16 x 9 pixels, of which 2 make a latent.
        given = {"num_inference_steps": 1, "latents": torch.zeros(1, 4, 5, 8)}
        expected = stock(image.convert("RGB"), **given).prediction[0, ..., 0]
    for output in ("folder", "lora"):
        assert np.abs(np.load(tmp_path / output / "a.npy") - expected).max() <= 1e-5
        row = json.loads((tmp_path / output / "metrics.json").read_text())["results"][0]
        assert (row["steps"], row["start"], row["ensemble_size"]) == (1, "zeros", 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--num_inference_steps", "4"],
            "was trained to jump from zeros in one step, got num_inference_steps 4: leave num_inference_steps out",
        ),
        (["--ensemble_size", "3"], "which starts from zeros and always predicts the same, got 3: leave it out"),
    ],
)
def test_several_steps_or_predictions_from_zeros_are_refused_by_both_commands(
    sample: Callable[..., int],
    jump_run: Path,
    tiny_folder: Path,
    depth_rooms: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    assert sample("--model", str(tiny_folder), "--lora", str(jump_run), *options, "--dry_run") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert sentence in line and f"{tiny_folder} with {jump_run}" in line
    measured = ["--model", str(jump_run / "pipeline"), "--reference", str(depth_rooms), *options, "--dry_run"]
    assert main(["evaluate", "--task", "depth", *measured]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_several_predictions_have_an_uncertainty(sample: Callable[..., int], depth_run: Path, tmp_path: Path) -> None:
    options = ["--ensemble_size", "3", "--sampler", "flow", "--num_inference_steps", "1"]
    assert sample("--model", str(depth_run / "pipeline"), *options) == 0
    spread = np.load(tmp_path / "out/a_uncertainty.npy")
    assert spread.shape == (21, 34) and (spread >= 0).all() and spread.max() > 0


def test_files_are_not_replaced(sample: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.npy").touch()
    assert sample("--model", "x") == 2
    assert "a.npy exists: choose another output_dir" in capsys.readouterr().err


def test_what_cannot_be_used_is_refused_in_one_line(
    sample: Callable[..., int],
    depth_run: Path,
    tiny_folder: Path,
    adapted: tuple[object, dict[str, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = str(depth_run / "pipeline")
    cases = {
        ("--model", str(tiny_folder)): "is a text-to-image model, which sees no image: give the folder pipeline of a",
        ("--model", str(tiny_folder), "--lora", str(adapted[1]["peft"])): "was not trained on depth",
        ("--model", pipeline, "--processing_resolution", "15"): "processing_resolution must be a multiple of 2, got 15",
        ("--model", pipeline, "--processing_resolution", "4"): ".png: 34x21 pixels are too small: the shorter side is",
        ("--model", pipeline, "--prompts", "a"): "--prompts is not an option of d2f sample --task depth",
    }
    for number, (options, sentence) in enumerate(cases.items()):
        assert sample(*options, output=f"out{number}") == 2, options
        error = capsys.readouterr().err.splitlines()[-1]
        assert sentence in error, options
    assert sample("--model", pipeline, image="missing.png") == 2
    assert "missing.png does not exist: give an image file or a folder" in capsys.readouterr().err.splitlines()[-1]


def test_folder_of_a_depth_run_generates_no_images(depth_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--model", str(depth_run / "pipeline"), "--prompts", "a", "--dry_run"]) == 2
    assert "takes 8 channels, and its latents have 4: add --task depth for a model of depth" in capsys.readouterr().err


def test_task_that_only_a_file_names_is_refused_with_the_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("task: depth\nprompts: [a]\n")
    assert main(["sample", "--config", str(tmp_path / "c.yaml"), "--dry_run"]) == 2
    assert "task" in capsys.readouterr().err
