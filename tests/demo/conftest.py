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

    def make(section: str, network: str, distance: float, half: float = 0.5, **entries: Any) -> dict[str, Any]:
        return {
            "section": section,
            "network": network,
            "samples": 10,
            "frechet_distance": distance,
            "frechet_low": distance - half,
            "frechet_high": distance + half,
            "frechet_floor": 1.0,
            "name_top1": 0.5,
            "name_top5": 0.75,
            **entries,
        }

    return make


@pytest.fixture(scope="session")
def make_rows(make_row: Callable[..., dict[str, Any]]) -> Callable[..., Rows]:
    """Return a function that makes the rows of a demo from the distances that decide its sentences."""

    def make(aligned: float, naive: float, reflow: float, base: float) -> Rows:
        same = {"section": "same_images", "network": "base", "samples": 3, "steps": 25, "largest_difference": 0.013}
        curves = [
            make_row("continued", network, distance + (9.0 if step == 0 else 0.0), training_steps=step)
            for network, distance in (("diff2flow", aligned), ("fm", naive), ("diffusion", 4.0))
            for step in (0, 10, 20, 40)
        ]
        few_steps = [
            make_row("few_steps", network, distance / count, evaluations=count, allowed=count, guidance_scale=1.0)
            for network, distance in (("reflow", reflow), ("base", base))
            for count in (1, 2, 25)
        ]
        style = [
            make_row("style", network, distance, names=names)
            for network, distance in (("base", 90.0), ("style", 11.0))
            for names in ("trained", "held out")
        ]
        return [same, *curves, *few_steps, *style]

    return make
