"""Fixtures of the miniature's tests."""

import pytest
from diffusers import StableDiffusionPipeline

from d2f_fast.miniature import load_miniature


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """Return the miniature, without progress bars."""
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe
