"""Fixture of the tests of layers: small UNets with LoRA, a training step of them, and comparisons of its results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from d2f_fast.lora.inject import inject_lora

Results = dict[str, Tensor]


class SmallUNets:
    """Functions that make small UNets of Stable Diffusion's layers, run a training step, and compare its results."""

    @staticmethod
    def new_unet(**options: Any) -> UNet2DConditionModel:
        """Return a UNet with seeded random weights; `options` change its configuration."""
        torch.manual_seed(0)
        defaults = {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        return UNet2DConditionModel(**{**defaults, **options})

    @staticmethod
    def randomize(unet: nn.Module) -> None:
        """Fill every B with seeded random numbers, as training would."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    @staticmethod
    def adapted(
        unet: UNet2DConditionModel | None = None, *, convolutions: bool = True, alpha: float = 3.0
    ) -> UNet2DConditionModel:
        """Return the UNet, or a new one, with random LoRA layers in attention and, if asked, in convolutions."""
        unet = SmallUNets.new_unet() if unet is None else unet
        inject_lora(unet, 4, alpha=alpha, conv_rank=3 if convolutions else 0, first_last_layers=convolutions)
        SmallUNets.randomize(unet)
        return unet

    @staticmethod
    def inputs(unet: UNet2DConditionModel, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return sample, timestep and text, in the type of the UNet's weights."""
        generator, like = torch.Generator().manual_seed(seed), unet.conv_in.weight
        sample = torch.randn(batch, 4, 8, 8, generator=generator).to(like.dtype)
        timestep = torch.linspace(20, 673.16, batch)
        return sample, timestep, torch.randn(batch, 8, 16, generator=generator).to(like.dtype)

    @staticmethod
    def step(
        unet: UNet2DConditionModel,
        call: Callable[..., Any] | None = None,
        *,
        batch: int = 2,
        seed: int = 1,
        **kwargs: Any,
    ) -> Results:
        """Return the output of one forward, and the gradient of every parameter that trains."""
        unet.zero_grad()
        output = (unet if call is None else call)(*SmallUNets.inputs(unet, batch, seed), **kwargs, return_dict=False)[0]
        output.float().square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
        return {"output": output.detach().clone(), **gradients}

    @staticmethod
    def largest_error(got: Results, want: Results) -> float:
        """Return the largest relative error of an output or gradient."""
        assert got.keys() == want.keys() and len(want) > 20
        errors = [(got[name].double() - want[name].double()).norm() / want[name].double().norm() for name in want]
        return max(error.item() for error in errors)

    @staticmethod
    def assert_equal(got: Results, want: Results) -> None:
        """Assert that all results are bitwise equal."""
        assert got.keys() == want.keys()
        assert not [name for name in want if not torch.equal(got[name], want[name])]

    @staticmethod
    def with_config(**options: Any) -> UNet2DConditionModel:
        """Return a UNet whose random LoRA layers have the given options of peft's configuration."""
        unet = SmallUNets.new_unet()
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(**{"r": 4, "target_modules": ["to_q", "conv1"], **options}))
        SmallUNets.randomize(unet)
        return unet


@pytest.fixture
def unets() -> type[SmallUNets]:
    """Return the helpers for small UNets."""
    return SmallUNets
