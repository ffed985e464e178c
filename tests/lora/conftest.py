"""Networks that take an adapter, and their output for a fixed input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


@pytest.fixture
def unet(tiny_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()


@pytest.fixture
def forward() -> Callable[[Any], Tensor]:
    """Return the output of a UNet for a fixed input."""

    @torch.no_grad()
    def output(unet: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 16, generator=generator)
        timesteps = torch.tensor([673.16, 20.0])
        dtype = unet.conv_in.weight.dtype
        return unet.eval()(sample.to(dtype), timesteps, text.to(dtype)).sample

    return output


@pytest.fixture
def randomize() -> Callable[[nn.Module], None]:
    """Make every layer's B as random as its A, as training does."""

    @torch.no_grad()
    def fill(unet: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    return fill


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    """Return the norm of a difference, relative to the norm of the truth."""
    return lambda difference, truth: (difference.norm() / truth.norm()).item()
