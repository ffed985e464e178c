"""Conditions of a diffusers UNet: the text, and the latents of images beside its own; several of them in one batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class Condition:
    """Conditions on which a UNet is evaluated in one call, for the same state of B samples.

    Args:
        encoder_hidden_states: text condition, [copies · B, L, D], in the type of the UNet.
        added: further conditions of SDXL's UNet, [copies · B, ...]; empty for a UNet without them.
        context: latents of the k images that the UNet sees, [copies · B, k · C, h, w]; None for a UNet that sees none.
        context_first: whether the context comes before the UNet's own latents along the channels.
        copies: number of conditions of each sample.
    """

    encoder_hidden_states: Tensor
    added: Mapping[str, Tensor]
    context: Tensor | None = None
    context_first: bool = True
    copies: int = 1

    def evaluate(self, unet: "UNet2DConditionModel", sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the UNet's output for a state, [copies · B, C, h, w], those of one condition after the other.

        Args:
            unet: conditional UNet of diffusers.
            sample: diffusion state in the type of the UNet, [B, C, h, w].
            timestep: fractional timestep, [] or [B] float32.
        """
        given = torch.cat([sample] * self.copies) if self.copies > 1 else sample
        if self.context is not None:
            context = self.context.to(given)
            given = torch.cat([context, given] if self.context_first else [given, context], 1)
        if timestep.ndim and self.copies > 1:
            timestep = torch.cat([timestep] * self.copies)
        extra = {"added_cond_kwargs": dict(self.added)} if self.added else {}
        hidden = self.encoder_hidden_states
        output: Tensor = unet(given, timestep, encoder_hidden_states=hidden, **extra, return_dict=False)[0]
        return output


def guided_condition(
    alone: Condition, negative_hidden_states: Tensor, added: Mapping[str, Tensor], guides_by_image: bool
) -> Condition:
    """Return the conditions that guidance compares: the negative text and the text, both with the images.

    Args:
        alone: condition without guidance.
        negative_hidden_states: text condition to steer away from, [B, L, D], in the type of the UNet.
        added: further conditions of SDXL's UNet, the negative ones first, then the positive ones.
        guides_by_image: whether the negative text with zeros in place of the images comes before the other two.

    Raises:
        ValueError: there are no images to guide by.
    """
    texts, context = [negative_hidden_states, alone.encoder_hidden_states], alone.context
    contexts = [] if context is None else [context, context]
    if guides_by_image:
        if context is None:
            raise ValueError("image_guidance_scale needs context")
        texts.insert(0, negative_hidden_states)
        contexts.insert(0, torch.zeros_like(context))
        added = {name: torch.cat([value.chunk(2)[0], value]) for name, value in added.items()}
    joined = torch.cat(contexts) if contexts else None
    return Condition(torch.cat(texts), added, joined, alone.context_first, len(texts))
