"""Fixtures of the tests of tasks: the tiny model and plans of a few pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.models.base_model import BaseModel
from d2f_fast.tasks.pairs import PairGenerator, PairPlan


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> BaseModel:
    """Return the tiny model, which no test changes."""
    return BaseModel.load(tiny_folder)


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., PairPlan]:
    """Return a function that makes the plan of ten pairs in shards of four."""

    def make(**options: Any) -> PairPlan:
        defaults: dict[str, Any] = {
            "prompts": ("ab", "c", "de"),
            "num_pairs": 10,
            "pairs_per_shard": 4,
            "batch_size": 3,
            "seed": 0,
            "times": torch.linspace(0, 1, 3),
            "solver": "euler",
            "guidance_scale": 3.0,
            "negative_prompt": "",
            "height": 16,
            "width": 16,
            "dtype": "float32",
        }
        values = defaults | options
        return PairPlan(**{"guidance_scale_max": values["guidance_scale"], **values})

    return make


@pytest.fixture(scope="session")
def make_generator(tiny_model: BaseModel, make_plan: Callable[..., PairPlan]) -> Callable[..., PairGenerator]:
    """Return a function that makes the generator of a plan with the tiny model."""

    def make(**options: Any) -> PairGenerator:
        return PairGenerator(tiny_model, tiny_model.flow, make_plan(**options), {"model": "m"})

    return make
