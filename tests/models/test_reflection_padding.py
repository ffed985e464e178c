"""Autoencoders whose convolutions pad by reflection: the arithmetic, and the entry that keeps the setting."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.reflection_padding import pads_by_reflection, set_reflection_padding


@pytest.fixture
def vae(tiny_folder: Any) -> Any:
    return AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae")


def padded_by_hand(vae: nn.Module) -> nn.Module:
    """Return a copy in which a module of its own pads by reflection before each convolution without padding."""
    vae = copy.deepcopy(vae)
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.padding != (0, 0):
                height, width = child.padding
                child.padding = (0, 0)
                setattr(module, name, nn.Sequential(nn.ReflectionPad2d((width, width, height, height)), child))
    return vae


@torch.no_grad()
def test_images_and_latents_are_those_of_explicit_reflection(vae: Any) -> None:
    pixels, expected = torch.randn(2, 3, 16, 24), padded_by_hand(vae)
    zeros = vae.encode(pixels).latent_dist.mean
    assert set_reflection_padding(vae, True)
    latents = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents, expected.encode(pixels).latent_dist.mean)
    torch.testing.assert_close(vae.decode(latents).sample, expected.decode(latents).sample)
    assert (latents - zeros).abs().max() > 1e-3


def test_autoencoder_is_left_as_it_is_where_nothing_asks_for_reflection(vae: Any) -> None:
    assert not set_reflection_padding(vae) and not pads_by_reflection(vae)
    assert {module.padding_mode for module in vae.modules() if isinstance(module, nn.Conv2d)} == {"zeros"}


def test_setting_is_saved_in_the_configuration_and_applied_when_the_folder_is_loaded(
    tiny_folder: Any, tmp_path: Any
) -> None:
    plain = BaseModel.load(tiny_folder)
    model = BaseModel.load(tiny_folder, options=ModelOptions(vae_reflection_padding=True))
    assert "padded by reflection" in str(model.facts) and "padded by" not in str(plain.facts)
    assert model.fingerprint("vae") != plain.fingerprint("vae")  # which is part of the cache's key
    model.pipeline.save_pretrained(tmp_path / "saved")
    loaded = BaseModel.load(tmp_path / "saved")
    assert pads_by_reflection(loaded.vae)
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded.encode_images(pixels)["mean"], model.encode_images(pixels)["mean"])
    assert loaded.fingerprint("vae") == model.fingerprint("vae") and loaded.facts.vae_reflection_padding
    zeros = BaseModel.load(tmp_path / "saved", options=ModelOptions(vae_reflection_padding=False))
    assert torch.equal(zeros.encode_images(pixels)["mean"], plain.encode_images(pixels)["mean"])
    assert not zeros.facts.vae_reflection_padding
