"""Fixtures of the demo's tests: a tiny pipeline, and rows of results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from d2f_fast.models.base_model import BaseModel

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def load(tiny_folder: Path) -> Callable[[], StableDiffusionPipeline]:
    """Return a function that loads a new copy of the tiny pipeline."""
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(load: Callable[[], StableDiffusionPipeline]) -> BaseModel:
    """Return the tiny pipeline as a base model."""
    return BaseModel(load())


@pytest.fixture(scope="session")
def make_row() -> Callable[..., dict[str, Any]]:
    """Return a function that makes a row of one network at a distance, with an interval of `half` on both sides."""

    def make(objective: str, distance: float, half: float = 0.05, steps: int = 4, **entries: Any) -> dict[str, Any]:
        return {
            "measure": "quality",
            "objective": objective,
            "sampler": "flow",
            "spacing": "uniform",
            "steps": steps,
            "samples": 10,
            "frechet_distance": distance,
            "frechet_low": distance - half,
            "frechet_high": distance + half,
            "frechet_floor": 0.1,
            **entries,
        }

    return make


@pytest.fixture(scope="session")
def make_rows(make_row: Callable[..., dict[str, Any]]) -> Callable[..., Rows]:
    """Return a function that makes all measured rows of a run whose networks end at the given distances."""

    def make(diff2flow: float, fm: float, diffusion: float, base: float, fm_paper: float = 2.0) -> Rows:
        distances = {"base": base, "diff2flow": diff2flow, "fm": fm, "fm_paper": fm_paper, "diffusion": diffusion}
        quality = [
            make_row(name, distance + extra, spacing=spacing)
            for name, distance in distances.items()
            for spacing, extra in (("uniform", 0.0), ("trailing", 0.01))
        ]
        training = [
            make_row(name, distances[name] + late, measure="training", training_steps=step, flow_loss=1.0 + late)
            for name in ("diff2flow", "fm", "fm_paper", "diffusion")
            for step, late in ((0, 9.0), (10, 1.0), (40, 0.0))
        ]
        brightness = {"grey_bias": 0.9, "grey_bias_low": 0.8, "grey_bias_high": 1}
        return [*quality, *training, make_row("base", 0.0, measure="grey_bias", captions="no colour", **brightness)]

    return make
