"""Test the straightness of a model's paths against the velocity of its network."""

from pathlib import Path

import pytest
import torch

from d2f_fast.evaluation import path_set
from d2f_fast.evaluation.image_set import noise_generator
from d2f_fast.evaluation.straightness import measure_straightness
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity


def test_paths_are_those_of_the_network_and_do_not_depend_on_the_batch_size(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_set, "SEGMENTS", 2)
    monkeypatch.setattr(path_set, "STEPS_PER_SEGMENT", 2)
    model, prompts = BaseModel.load(tiny_folder), ["ab", "c", "ab"]
    noise = torch.stack([torch.randn(4, 8, 12, generator=noise_generator(3, i)) for i in range(3)])
    with torch.no_grad():
        condition = model.encode_prompts(prompts)["encoder_hidden_states"]
        away = model.encode_prompts(["d"] * 3)["encoder_hidden_states"]
    expected = measure_straightness(unet_velocity(model.unet, model.flow, condition, away, 2.0), noise, 2, 2)
    for batch_size in (2, 8):
        found = path_set.measure_paths(
            model, model.flow, prompts, (16, 24), seed=3, batch_size=batch_size, guidance_scale=2.0, negative_prompt="d"
        )
        for name in ("deviation", "curvature", "step_error"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3)
