"""Start the flow of a model from images in place of noise."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from d2f_fast.flow.formulas import noised_source
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.image_context import fit_pixels


def start_of_flow(
    model: BaseModel,
    images: Sequence[Image.Image],
    height: int,
    width: int,
    source_noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the flow state at t = 0 of a model that was trained to start from images.

    Args:
        model: base model on its device.
        images: B images of mode RGB. Each is resized and cropped in the middle to the size.
        height: height in pixels.
        width: width in pixels.
        source_noise: share of noise that the model was trained with, in [0, 1]; 0 for none. See `noised_source`.
        generator: source of the noise, on the model's device or the CPU; None for torch's global generator.

    Returns:
        The scaled means of the autoencoder's posterior, noised, [B, C, h, w] float32.
    """
    source = model.scale_latents(model.encode_images(fit_pixels(images, height, width))["mean"]).float()
    if source_noise == 0:
        return source
    noise = randn_tensor(source.shape, generator=generator, device=source.device, dtype=torch.float32)
    return noised_source(source, noise, source_noise)
