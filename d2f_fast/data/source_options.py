"""Options of a flow that starts from an image. This module imports no torch, so that `d2f --help` answers at once."""

import dataclasses
from dataclasses import dataclass

from d2f_fast.config import LoraFormat, ObjectiveName, TrainingConfig, at_least, check_options, option
from d2f_fast.errors import RefusedInputError


@dataclass(frozen=True)
class SourceOptions:
    """Hold the options that say where the flow from a source image to a target image starts.

    Args:
        source_noise: Share S of noise in the start of the flow, which is (1 - S) times the latents of the source image
            plus S times noise: the point of the flow from noise to the source at flow time 1 - S. 0 starts at the
            source itself, and 1 at noise, as --task text does. The value is saved with the result.

    Raises:
        RefusedInputError: The option has a value that it does not take.
    """

    source_noise: float = option("image to image", 0.0, at_least(0, 1.0))

    def __post_init__(self) -> None:
        """Refuse a value that the option does not take."""
        check_options(self)


def options_for_source(config: TrainingConfig) -> TrainingConfig:
    """Return the options of a run from source to target images, with what the task settles where it is left open.

    Args:
        config: Options of the run.

    Returns:
        The same options, with LoRA files for diffusers alone, because no other program starts from the source.
    """
    default: LoraFormat | None = "diffusers" if config.adapter == "lora" else None
    return dataclasses.replace(config, lora_format=config.lora_format or default)


def check_source_training(objective: ObjectiveName | None, *, has_teacher: bool) -> None:
    """Refuse what has no meaning where the flow starts from an image.

    Args:
        objective: Objective of the run; None where the model settles it, which it never does to "diffusion".
        has_teacher: Whether the velocity of another model is learned.

    Raises:
        RefusedInputError: The objective is "diffusion", or there is a teacher.
    """
    if objective == "diffusion":
        raise RefusedInputError(
            "objective diffusion always starts from noise, and task image_to_image from a source image: give"
            " --objective diff2flow or fm"
        )
    if has_teacher:
        raise RefusedInputError("teacher does not go with --task image_to_image: leave it out")
