"""Test the measurements of the demo that are not images of the evaluation set."""

import pytest
import torch

from d2f_fast.demo.generation import start_noise
from d2f_fast.demo.measurements import flow_loss
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.base_model import BaseModel

PROMPTS = ["a cat on a red background", "a boot on a black background"]


def test_flow_loss_equals_the_training_objective_at_the_same_times(model: BaseModel) -> None:
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    noise, prompts = start_noise(4, model, 0), PROMPTS * 2
    latents = model.scale_latents(model.encode_images(images)["mean"])
    t = (torch.arange(4) + 0.5) / 4
    condition = model.encode_prompts(prompts)["encoder_hidden_states"]
    x_t = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
    with torch.no_grad():
        output = model.unet(x_t, 1000 * (1 - t), encoder_hidden_states=condition).sample
    expected = (-output - (latents - noise)).square().mean().item()
    assert flow_loss(model, NaiveFlow(), images, prompts, noise) == pytest.approx(expected, rel=1e-5)
    assert flow_loss(model, model.alignment, images, prompts, noise) != pytest.approx(expected, rel=1e-2)
