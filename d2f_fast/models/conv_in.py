"""Let a UNet see images beside its noisy latents, by widening its first convolution.

    weight' = [weight, weight, …] / (1 + images),    bias' = bias

The network then takes (1 + images) · C channels. For the inputs x and c it computes what the old network computes for
(x + c) / 2, so that training starts from a network whose first layer sees values of the size that it knows. Marigold,
arXiv 2312.02145, section 3.2; the published Diff2Flow code does the same.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from d2f_fast.errors import ModelError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@torch.no_grad()
def widen_conv_in(unet: "UNet2DConditionModel", images: int = 1) -> None:
    """Widen the first convolution of a UNet in place, so that it takes the latents of images beside its own.

    The configuration changes with it, so that the UNet can be saved, and loaded by diffusers. The order of the inputs
    does not matter at the start, because all of them have the same weights.

    Args:
        unet: Network without an adapter, which takes as many channels as it returns. Weights keep their type, device
            and whether they train.
        images: Number of images, at least 1, each with as many channels of latents as the network returns.

    Raises:
        ModelError: The UNet takes other inputs beside its latents already, or its first layer is adapted.
        ValueError: `images` is below 1.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    old, channels = unet.conv_in, unet.config.out_channels
    if type(old) is not nn.Conv2d:
        raise ModelError(f"conv_in is a {type(old).__name__}: widen the UNet before an adapter is added")
    if old.in_channels != channels:
        raise ModelError(
            f"the UNet takes {old.in_channels} channels and returns {channels}: only one that takes as many as it"
            " returns, such as that of a text-to-image model, can be widened"
        )
    new = nn.Conv2d(
        channels * (1 + images),
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    new.weight.copy_((old.weight.float() / (1 + images)).repeat(1, 1 + images, 1, 1))
    new.weight.requires_grad_(old.weight.requires_grad)
    if old.bias is not None:
        new.bias = old.bias  # the same parameter, which keeps all of its properties
    unet.conv_in = new.train(old.training)
    unet.register_to_config(in_channels=new.in_channels)
