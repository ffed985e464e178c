"""A widened first convolution: its closed form, its configuration, and a LoRA on it in stock diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.merge import merged_unet
from d2f_fast.lora.write import save_lora
from d2f_fast.models.conv_in import widen_conv_in


@pytest.fixture
def unet(tiny_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()


@torch.no_grad()
def output(unet: Any, sample: Tensor) -> Tensor:
    text = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    result: Tensor = unet(sample, torch.tensor([673.16, 20.0]), text.to(sample.dtype)).sample
    return result


@pytest.mark.parametrize("images", [1, 2, 3])
def test_widened_network_sees_the_mean_of_its_inputs(unet: Any, images: int) -> None:
    unet = unet.double()  # The order of float32 sums, which depends on the processor, is worth 1e-6.
    inputs = [torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(1 + images)]
    zeros = [torch.zeros_like(inputs[0])] * images
    cases = {
        "equal inputs": (inputs[:1] * (1 + images), inputs[0]),
        "no images": ([inputs[0], *zeros], inputs[0] / (1 + images)),
        "different inputs": (inputs, sum(inputs) / (1 + images)),
    }
    expected = {name: output(unet, mean) for name, (_, mean) in cases.items()}
    bias = unet.conv_in.bias.clone()
    widen_conv_in(unet, images)
    for name, (given, _) in cases.items():
        assert (output(unet, torch.cat(given, 1)) - expected[name]).abs().max() <= 1e-6, name
    assert torch.equal(unet.conv_in.bias, bias)


def test_widened_weight_is_that_of_the_marigold_trainer(unet: Any) -> None:
    # Marigold, src/trainer/marigold_depth_trainer.py, _replace_unet_conv_in
    expected = unet.conv_in.weight.clone().repeat((1, 2, 1, 1)) * 0.5
    widen_conv_in(unet)
    assert torch.equal(unet.conv_in.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_training_of_the_weights_stay(unet: Any, dtype: torch.dtype) -> None:
    unet.to(dtype).requires_grad_(False)
    widen_conv_in(unet)
    assert unet.conv_in.weight.dtype == unet.conv_in.bias.dtype == dtype
    assert not unet.conv_in.weight.requires_grad and not unet.conv_in.bias.requires_grad


def test_saved_network_is_loaded_by_diffusers(unet: Any, tmp_path: Path) -> None:
    widen_conv_in(unet)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert loaded.config.in_channels == 8 and loaded.config.out_channels == 4
    sample = torch.randn(2, 8, 8, 8)
    assert torch.equal(output(loaded, sample), output(unet, sample))


def test_lora_with_the_first_layer_gives_the_same_output_in_diffusers(
    unet: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    widen_conv_in(unet)
    unet.save_pretrained(tmp_path / "unet")
    sample = torch.randn(2, 8, 8, 8)
    before = output(unet, sample)
    trainable = inject_lora(unet, 2, conv_rank=2, first_last_layers=True)
    assert trainable["conv_in.lora_A.default.weight"].shape[0] == 72  # 9 · 8 is as expressive as the full weight
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.normal_(std=0.1)
    expected = output(unet, sample)
    assert (expected - before).norm() > 0.1 * before.norm()
    path = save_lora(unet, tmp_path / "lora", lora_format="both")
    assert load_file(path)["unet.conv_in.lora_A.weight"].shape == (72, 8, 3, 3)
    network = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, unet=network, safety_checker=None)
    stock.load_lora_weights(path)
    assert (output(stock.unet, sample) - expected).norm() <= 1e-4 * expected.norm()
    merged = merged_unet(unet)
    assert merged.config.in_channels == 8
    assert (output(merged, sample) - expected).norm() <= 1e-4 * expected.norm()


def test_network_that_cannot_be_widened_is_refused(unet: Any) -> None:
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        widen_conv_in(unet, 0)
    widen_conv_in(unet)
    with pytest.raises(ModelError, match="takes 8 channels and returns 4: only one that takes as many as it returns"):
        widen_conv_in(unet)
    inject_lora(unet, 2, first_last_layers=True)
    with pytest.raises(ModelError, match="widen the UNet before an adapter is added"):
        widen_conv_in(unet)
