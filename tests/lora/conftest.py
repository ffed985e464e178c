"""Networks that take an adapter, and their output for a fixed input."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_FOUR_LEVELS = {
    "block_out_channels": (8, 16, 32, 32),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "norm_num_groups": 4,
}
# The configurations of the three families, of which only the channels are fewer.
_FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_FOUR_LEVELS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (8, 16, 32),
        "down_block_types": (_PLAIN, _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 2048,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.fixture(scope="session")
def make_family_unet() -> Callable[..., UNet2DConditionModel]:
    """Return the function `make(family, **changes)`: a narrow UNet with the blocks of SD1.5, SD2.1 or SDXL."""

    def make(family: str, **changes: Any) -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(**_FAMILIES[family] | changes).eval()

    return make


@pytest.fixture(scope="session")
def family_unet(make_family_unet: Any) -> Callable[[str], UNet2DConditionModel]:
    """Return the function `family_unet(family)`: one UNet of each family, which no test may change."""
    return functools.cache(make_family_unet)


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
