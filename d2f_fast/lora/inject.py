"""Add LoRA adapters to a UNet. peft injects them, and owns their parameters."""

import math
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from d2f_fast.errors import ModelError
from d2f_fast.lora.float32_weights import float32_stand_ins
from d2f_fast.lora.targets import CONVOLUTION_TARGETS, FIRST_LAYER, LAST_LAYER, LINEAR_TARGETS, check_targets

ADAPTER = "default"


def inject_lora(
    unet: UNet2DConditionModel,
    rank: int,
    *,
    alpha: float | None = None,
    conv_rank: int = 0,
    first_last_layers: bool = False,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, nn.Parameter]:
    """Freeze a UNet and add float32 LoRA layers to it. Its output does not change, because B starts at zero.

    Args:
        unet: Network to adapt, in place; its configuration stays.
        rank: Rank of the linear layers, 1 or more.
        alpha: The scale is alpha / rank, the same for every layer. None means rank, a scale of 1.
        conv_rank: Rank of the convolutions in residual blocks and samplers; 0 leaves them out.
        first_last_layers: Whether conv_in and conv_out are adapted too. Their ranks, 9 times the input channels and the
            number of output channels, make them as expressive as the full weights.
        target_modules: Endings of module names to adapt in place of the attention and feed-forward layers; None keeps
            those.
        seed: Seed of the initial values of A.

    Returns:
        The trainable parameters by name.

    Raises:
        ModelError: No module of the UNet has such a name, a rank is out of range, or the UNet has an adapter already.
    """
    if rank < 1 or conv_rank < 0:
        raise ModelError(f"rank must be at least 1 and conv_rank at least 0, got {rank} and {conv_rank}")
    targets = list(LINEAR_TARGETS if target_modules is None else target_modules)
    check_targets(target_modules or (), adaptable_names(unet))
    ranks: dict[str, int] = {}
    if conv_rank:
        ranks |= dict.fromkeys(CONVOLUTION_TARGETS, conv_rank)
    if first_last_layers:
        ranks |= {
            FIRST_LAYER: unet.conv_in.in_channels * math.prod(unet.conv_in.kernel_size),
            LAST_LAYER: unet.conv_out.out_channels,
        }
    names = [f".{name}" for name, _ in unet.named_modules()]
    # A UNet of one level changes no resolution, and peft warns about a rank of layers that are not there.
    ranks = {target: r for target, r in ranks.items() if any(name.endswith(f".{target}") for name in names)}
    scale = 1.0 if alpha is None else alpha / rank
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=[*targets, *ranks],
        rank_pattern=ranks,
        alpha_pattern={name: scale * r for name, r in ranks.items()},
    )
    return add_adapter(unet, config, seed)


def adaptable_names(unet: nn.Module) -> list[str]:
    """Return the names of the linear layers and convolutions of a UNet."""
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def add_adapter(unet: UNet2DConditionModel, config: LoraConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze a UNet, let peft add an adapter to it, and return the trainable parameters by name, in float32.

    Args:
        unet: Network to adapt, in place.
        config: Layers, ranks and scales of the adapter.
        seed: Seed of the initial values of A.

    Raises:
        ModelError: peft refuses the configuration, or the UNet has an adapter already.
    """
    unet.requires_grad_(False)
    targets = sorted(config.target_modules)[:10]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with float32_stand_ins(unet):
                unet.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ModelError(f"the UNet takes no LoRA on {targets}: {error}") from error
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted modules of a UNet by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
