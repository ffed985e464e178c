"""Fixtures of the command line's tests: a folder of captioned images, and a short training of the tiny model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.commands.main import main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folder of three captioned images of 16 x 16 pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("abc")
    return folder


@pytest.fixture
def train(images: Path, tiny_folder: Path) -> Callable[..., int]:
    """Function that trains the tiny model for two steps into a folder, with more options, and returns the exit code."""

    def run(output: Path, *more: str) -> int:
        paths = ["--train_data_dir", str(images), "--pretrained_model_name_or_path", str(tiny_folder)]
        options = ["--max_train_steps", "2", "--train_batch_size", "2"]
        options += [] if "--resolution" in more else ["--resolution", "16"]
        options += [] if "full" in more else ["--rank", "2"]
        return main(["train", *paths, "--output_dir", str(output), *options, *more])

    return run


@pytest.fixture(scope="session")
def depth_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, depth_rooms: Path) -> Path:
    """Folder of a short run of the tiny model on depth, with its LoRA and its pipeline. No test may change it."""
    output = tmp_path_factory.mktemp("depth") / "run"
    assert _train_depth(output, tiny_folder, depth_rooms, "--depth_normalization", "disparity") == 0
    return output


@pytest.fixture(scope="session")
def jump_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, depth_rooms: Path) -> Path:
    """Folder of a short run of the tiny model on depth in one step from zeros. No test may change it."""
    output = tmp_path_factory.mktemp("jump") / "run"
    assert _train_depth(output, tiny_folder, depth_rooms, "--distill") == 0
    return output


def _train_depth(output: Path, model: Path, rooms: Path, *more: str) -> int:
    """Train a model on depth for two steps with more options, and return the exit code."""
    paths = ["--train_data_dir", str(rooms), "--pretrained_model_name_or_path", str(model)]
    options = ["--max_train_steps", "2", "--resolution", "16", "--train_batch_size", "2", "--rank", "2"]
    options += ["--learning_rate", "1e-2", "--ema_decay", "0"]
    return main(["train", "--task", "depth", *paths, "--output_dir", str(output), *options, *more])
