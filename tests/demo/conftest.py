"""What the demo's tests share: a tiny pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from d2f_fast.models.base_model import BaseModel


@pytest.fixture(scope="module")
def load(tiny_folder: Path) -> Callable[[], Any]:
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def model(load: Callable[[], Any]) -> BaseModel:
    return BaseModel(load())
