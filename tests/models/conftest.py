"""The tiny model, loaded by this package and by diffusers, and a copy of its folder."""

import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from d2f_fast.models.base_model import BaseModel


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> BaseModel:
    return BaseModel.load(tiny_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.vae.requires_grad_(False)  # for weights that train, torch uses kernels that round differently
    return pipeline
