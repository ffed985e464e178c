"""The context of a network that sees images: their latents, in the scale and the order that the network takes."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.context_form import ContextForm, context_form


def form_of(model: BaseModel) -> ContextForm:
    """Return how the network of a base model takes the latents of images."""
    pipeline = model.pipeline
    return context_form(type(pipeline).__name__, bool(pipeline.config.get("is_cosxl_edit", False)))


def encode_context(model: BaseModel, images: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Return the latents of images as the network sees them: the means of the autoencoder's posterior.

    Args:
        model: Base model on its device.
        images: B images of mode RGB. Each is resized and cropped in the middle to the size.
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        The latents, [B, C, height / f, width / f] float32; f is the downsampling of the autoencoder.
    """
    mean = model.encode_images(fit_pixels(images, height, width))["mean"]
    return (model.scale_latents(mean) if form_of(model).scaled else mean).float()


def check_sampling_context(model: BaseModel, context: Tensor | None, shape: Sequence[int]) -> None:
    """Refuse a context that the network does not take, and a missing one that it takes.

    Args:
        model: Base model.
        context: Latents of the images that the network sees; None for none.
        shape: Shape [B, C, h, w] of the latents that are generated.

    Raises:
        RefusedInputError: The context is missing, or its shape is another one.
    """
    channels = int(model.unet.config.in_channels) - int(model.unet.config.out_channels)
    if context is None and channels:
        raise RefusedInputError(
            f"the network sees an image beside its own latents, in {channels} channels, and prompts give none: give"
            " its latents as context; for depth, call the MarigoldDepthPipeline that save_pipeline writes"
        )
    wanted = [shape[0], channels, *shape[2:]]
    if context is not None and list(context.shape) != wanted:
        raise RefusedInputError(
            f"context must have shape {wanted} for these prompts, this size and this network, got {list(context.shape)}"
        )


def fit_pixels(images: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Return RGB images, resized and cropped in the middle to a size, as [B, 3, height, width] float32 in [-1, 1].

    Args:
        images: B images of mode RGB.
        height: Height in pixels.
        width: Width in pixels.
    """
    fitted = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) for image in images]
    return torch.stack([_pixels(image) for image in fitted])


def _pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as [3, H, W] float32 in [-1, 1]."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1
