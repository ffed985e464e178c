"""Test the measurement that compares the two samplers of the same weights."""

from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from d2f_fast.demo.measurements import Measurements
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.models.base_model import BaseModel


def test_base_generates_the_same_images_by_its_own_sampler_and_along_the_flow(model: BaseModel) -> None:
    domain: Any = SimpleNamespace(
        prompts=["a cat", "a boot", "a hat", "a dog"], one_of_each_colour=lambda: [1, 3], count=4
    )
    settings = DemoSettings(own_steps=4, own_images=3)
    measurements = Measurements(settings, domain, domain, domain, 0, tqdm(disable=True))
    measurements.measure_same_images(model)
    (row,) = measurements.rows
    assert row["samples"] == 3 and row["evaluations"] == 8
    assert row["largest_difference"] < 0.1
    shown = {name: images for (_, name, _), images in measurements.shown.items()}
    assert {name: len(images) for name, images in shown.items()} == {"ddim": 2, "same times": 2, "even times": 2}
    torch.testing.assert_close(shown["same times"], shown["ddim"], rtol=0, atol=1e-3)
    assert (shown["even times"] - shown["ddim"]).abs().max() > 1e-2
