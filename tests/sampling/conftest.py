"""Fixture of the tests of sampling: a stock pipeline of tiny random parts."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def loaded(tiny_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@pytest.fixture
def pipe(loaded: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Return a pipeline whose scheduler the test may replace; by default it generates 16 x 16 pixels."""
    own = StableDiffusionPipeline(**loaded.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own
