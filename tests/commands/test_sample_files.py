"""Files of `d2f sample` beside its images: inverted images, noise, and states on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.commands.main import main
from d2f_fast.commands.sample_files import read_noise
from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_file import read_tensors, write_tensors


@pytest.fixture
def sample(tiny_folder: Path) -> Any:
    """Return a function that runs `d2f sample` of the tiny model for one small image, and returns the exit code."""

    def run(output: Path, *more: str) -> int:
        size = ["--height", "16", "--width", "16", "--output_dir", str(output)]
        return main(["sample", "--prompts", "ab", "--model", str(tiny_folder), *size, *more])

    return run


def test_states_on_the_way_are_written_beside_the_image(sample: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert sample(tmp_path, "--intermediates", "--method", "rk4", "--num_inference_steps", "2") == 0
    names = [f"{number}{state}.png" for number in ("000", "001") for state in ("", "_00", "_01", "_02")]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(names)
    states = [Image.open(tmp_path / name) for name in names[:4]]
    assert [state.text.get("flow_time") for state in states] == [None, "0", "0.5", "1"]
    assert np.array_equal(np.asarray(states[0]), np.asarray(states[3]))
    row = json.loads((tmp_path / "metrics.json").read_text())["results"][0]
    assert row["method"] == "rk4" and "Sampler: d2f flow rk4" in states[0].text["parameters"]


def test_inverted_image_is_generated_again_from_its_noise(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(picture)
    # The flow of random weights that predict noise is stiff; those that predict the flow are as smooth as real ones.
    solver = ["--method", "rk4", "--num_inference_steps", "8", "--prediction_type", "flow_prediction"]
    assert sample(tmp_path / "inverted", *solver, "--invert", str(picture)) == 0
    assert "d2f: guidance_scale 1, the default with --invert" in capsys.readouterr().err
    row = json.loads((tmp_path / "inverted" / "metrics.json").read_text())["results"][0]
    assert 0 < row["round_trip_error"] < 1e-2 and row["guidance_scale"] == 1.0
    noise = tmp_path / "inverted" / "000_noise.safetensors"
    assert read_tensors(noise)[0]["noise"].shape == (4, 8, 8)
    assert sample(tmp_path / "again", *solver, "--noise", str(noise), "--guidance_scale", "1") == 0
    images = [Image.open(tmp_path / folder / "000.png") for folder in ("inverted", "again")]
    assert np.array_equal(*map(np.asarray, images))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--invert", "a.png", "b.png"], "invert: give one file for each of the 1 prompts, got 2"),
        (["--invert", "a.png"], "invert: a.png is not a file: check the path"),
        (["--noise", "a.safetensors"], "noise: a.safetensors is not a file"),
        (["--noise", "a", "--invert", "a"], "give either --invert or --noise"),
        (["--invert", "a.png", "--method", "euler_maruyama"], "invert has no use for the method euler_maruyama"),
        (["--rtol", "0.1"], "rtol has no effect with the method euler"),
        (["--guidance_interval", "0.8", "0.2"], "guidance_interval must be two rising flow times"),
        (
            ["--guidance_interval", "0", "0.5", "--guidance_scale", "1"],
            "guidance_interval has no effect with guidance_s",
        ),
        (["--onnx", ".", "--diffusion", "1"], "diffusion has no effect with the method euler"),
        (["--onnx", ".", "--intermediates"], "intermediates was settled when . was exported: leave it out"),
    ],
)
def test_unusable_options_are_refused(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--prompts", "ab", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error


def test_file_without_usable_noise_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"noise": torch.zeros(4, 8, 8)})
    write_tensors(tmp_path / "b", {"noise": torch.zeros(4, 8, 16)})
    write_tensors(tmp_path / "c", {"other": torch.zeros(4, 8, 8)})
    assert read_noise([str(tmp_path / "a")] * 2).shape == (2, 4, 8, 8)
    with pytest.raises(CheckpointError, match=r"has noise of \[4, 8, 16\], and .* of \[4, 8, 8\]: generate images"):
        read_noise([str(tmp_path / name) for name in "ab"])
    with pytest.raises(CheckpointError, match="c holds no noise: give a file that d2f sample --invert wrote"):
        read_noise([str(tmp_path / "c")])
