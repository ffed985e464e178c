"""Refuse options of sampling that do not go together, or not with the model. Imports no torch."""

from typing import NamedTuple

from d2f_fast.config import DEFAULT_GUIDANCE, MAX_GUIDANCE, SamplingMethod, check_finite
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.image_sizes import side_multiple


class ChosenSteps(NamedTuple):
    """Number of sampling steps.

    Attributes:
        number: The number.
        source: Where it comes from, in words that follow the number.
    """

    number: int
    source: str


class ChosenGuidance(NamedTuple):
    """Scale of classifier-free guidance.

    Attributes:
        scale: The scale.
        source: Where it comes from, in words that follow the scale.
    """

    scale: float
    source: str


def check_negative_prompt(negative_prompt: str, guidance_scale: float) -> None:
    """Refuse a negative prompt without guidance, which alone uses it.

    Raises:
        RefusedInputError: There is a negative prompt, and the guidance scale is 1 or 0.
    """
    if negative_prompt and guidance_scale <= 1:
        raise RefusedInputError(
            f"negative_prompt has no effect with guidance_scale {guidance_scale:g}: leave it out, or give a"
            " guidance_scale above 1"
        )


def check_image_guidance(name: str, value: float | None) -> None:
    """Refuse a scale of image guidance that InstructPix2Pix does not take; None is accepted.

    Raises:
        RefusedInputError: The value is below 1, infinite or not a number.
    """
    check_finite(name, value, MAX_GUIDANCE)
    if value is not None and value < 1:
        raise RefusedInputError(f"{name} must be 1, which turns it off, or above, got {value}")


def check_steps(method: SamplingMethod, steps: int) -> None:
    """Refuse a single sampling step of a method that would then be the Euler method, because its last step is.

    Raises:
        RefusedInputError: The method is "midpoint" or "heun", and there is one step.
    """
    if method in ("midpoint", "heun") and steps == 1:
        raise RefusedInputError(
            f"method {method} needs at least 2 num_inference_steps, because its last step is an Euler step: give more"
            " steps, or leave method out"
        )


def check_jump(model: str, name: str, steps: int | None, ensemble_size: int = 1) -> None:
    """Refuse several steps, and several predictions, of a model that jumps from zeros to its result in one step.

    Args:
        model: Name of the model, for the message.
        name: Name of the option that gives the number of steps, for the message.
        steps: Number of sampling steps that was given; None for none.
        ensemble_size: Number of predictions that are combined.

    Raises:
        RefusedInputError: There are several steps, of which only the first was trained, or several predictions, which
            would be equal.
    """
    if steps not in (None, 1):
        raise RefusedInputError(
            f"{printable(model)} was trained to jump from zeros in one step, got {name} {steps}: leave {name} out"
        )
    if ensemble_size != 1:
        raise RefusedInputError(
            f"ensemble_size must be 1 with {printable(model)}, which starts from zeros and always predicts the same,"
            f" got {ensemble_size}: leave it out"
        )


def own_size(sample_size: object, downsampling: int) -> tuple[int, int]:
    """Return the height and width in pixels of the images that a model was made for.

    Args:
        sample_size: Entry of the UNet's configuration: the side of the latents, or their height and width.
        downsampling: Number of pixels along each side of one latent.

    Raises:
        RefusedInputError: The entry is missing, or does not state a size.
    """
    sides = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise RefusedInputError(
            f"the UNet's configuration has sample_size {sample_size}, and does not say the size of its images: give"
            " height and width"
        )
    return sides[0] * downsampling, sides[1] * downsampling


def complete_size(height: int | None, width: int | None, sample_size: object, downsampling: int) -> tuple[int, int]:
    """Return a size in pixels, in which the model's own height and width stand for those that are not given.

    Args:
        height: Height in pixels; None for the model's own.
        width: Width in pixels; None for the model's own.
        sample_size: Entry of the UNet's configuration: the side of the latents, or their height and width.
        downsampling: Number of pixels along each side of one latent.

    Raises:
        RefusedInputError: A size is not given, and the model has none.
    """
    if height is not None and width is not None:
        return height, width
    own_height, own_width = own_size(sample_size, downsampling)
    return height or own_height, width or own_width


def chosen_guidance(given: float | None, saved: float | None = None) -> ChosenGuidance:
    """Return the guidance scale: the one that was given, else the one saved with the weights, else the default."""
    if given is not None:
        return ChosenGuidance(given, "as given")
    if saved is not None:
        return ChosenGuidance(saved, "as saved with the model or LoRA")
    return ChosenGuidance(DEFAULT_GUIDANCE, "the default")


def guidance_or_default(given: float | None, saved: float | None = None) -> float:
    """Return the scale of `chosen_guidance`."""
    return chosen_guidance(given, saved).scale


def image_size(
    height: int | None, width: int | None, sample_size: object, downsampling: int
) -> tuple[int | None, int | None]:
    """Check a size in pixels, and complete it where only one of height and width is given.

    Args:
        height: Height in pixels; None for the model's own.
        width: Width in pixels; None for the model's own.
        sample_size: Entry of the UNet's configuration: the side of the latents, or their height and width.
        downsampling: Number of pixels along each side of one latent.

    Returns:
        Height and width, both None where neither is given.

    Raises:
        RefusedInputError: A size is not a multiple of what the pipeline needs, be it given or the model's own, or one
            is not given and the model has none.
    """
    multiple = side_multiple(downsampling)
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < 1 or size % multiple):
            raise RefusedInputError(f"{name} must be a positive multiple of {multiple}, got {size}")
    # A pipeline that is given one of the two ignores it, and takes both from the network's own size.
    completed = complete_size(height, width, sample_size, downsampling)
    for name, size in zip(("height", "width"), completed, strict=True):
        if size % multiple:
            raise RefusedInputError(
                f"the {name} that the model was made for, {size} pixels, is not a multiple of {multiple}: give height"
                " and width"
            )
    return (None, None) if height is None and width is None else completed
