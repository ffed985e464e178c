"""The velocity of a base model for a batch of prompts, which the solvers of `sampling/` integrate."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2f_fast.flow.flow import Flow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.image_context import form_of
from d2f_fast.sampling.integrate import Velocity, unet_velocity


def prompt_velocity(
    model: BaseModel,
    flow: Flow,
    prompts: Sequence[str],
    height: int,
    width: int,
    guidance_scale: float | Tensor = 1.0,
    negative: Mapping[str, Tensor] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    context: Tensor | None = None,
    image_guidance_scale: float = 1.0,
) -> Velocity:
    """Return the velocity of a base model for a batch of prompts.

    Args:
        model: base model on its device.
        flow: flow of its network, on the same device.
        prompts: B prompts.
        height: height of the images, in pixels; SDXL is conditioned on it.
        width: width of the images, in pixels.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off. A tensor [B, 1, 1, 1] gives each image a
            scale of its own.
        negative: condition to steer away from, of one prompt, as `encode_prompts` returns it; None for the model's own
            empty prompt.
        guidance_interval: lowest and highest flow time at which guidance is on.
        context: latents of the k images that the network sees, [B, k · C, h, w], in its own scale; see
            `encode_context`. None for a network that sees none.
        image_guidance_scale: scale of the guidance by these images, at least 1, which turns it off.

    Raises:
        RefusedInputError: `guidance_scale` is below 0, or between 0 and 1, or `image_guidance_scale` is below 1.
        ValueError: `guidance_interval` is not two rising flow times, or there is no context to guide by.
    """
    positive = model.encode_prompts(prompts)
    added = model.added_cond_kwargs(positive, height, width)
    hidden = positive["encoder_hidden_states"]
    seen = {
        "guidance_interval": guidance_interval,
        "context": context,
        "image_guidance_scale": image_guidance_scale,
        "context_first": form_of(model).first,
    }
    if not isinstance(guidance_scale, Tensor) and guidance_scale <= 1 and image_guidance_scale <= 1:
        return unet_velocity(model.unet, flow, hidden, None, guidance_scale, added, **seen)  # type: ignore[arg-type]
    one = model.empty_condition() if negative is None else negative
    other = {name: value.expand(len(prompts), *value.shape[1:]) for name, value in one.items()}
    if added is not None:
        of_other = model.added_cond_kwargs(other, height, width) or {}
        added = {name: torch.cat([of_other[name], added[name]]) for name in added}
    away = other["encoder_hidden_states"]
    return unet_velocity(model.unet, flow, hidden, away, guidance_scale, added, **seen)  # type: ignore[arg-type]
