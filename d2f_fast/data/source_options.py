"""Options of a flow that starts from an image. This module imports no torch, so that `d2f --help` answers at once."""

from dataclasses import dataclass

from d2f_fast.config import TrainingConfig, at_least, check_options, option
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


def check_source_training(config: TrainingConfig, *, has_teacher: bool) -> None:
    """Refuse options that have no meaning where the flow starts from an image.

    Args:
        config: Options of the run.
        has_teacher: Whether the velocity of another model is learned.

    Raises:
        RefusedInputError: The objective is "diffusion", there is a teacher or a validation prompt, or a LoRA file is
            for other programs, which start from noise.
    """
    if config.objective == "diffusion":
        raise RefusedInputError(
            "objective diffusion always starts from noise, and task image_to_image from a source image: give"
            " --objective diff2flow or fm"
        )
    cure = "does not go with --task image_to_image: leave it out"
    if has_teacher:
        raise RefusedInputError(f"teacher {cure}")
    if config.validation_prompts:
        raise RefusedInputError(f"validation_prompts {cure}, and give --validation_data_dir")
    if config.lora_format not in (None, "diffusers"):
        raise RefusedInputError(
            f"lora_format {config.lora_format} is for programs that start from noise: leave it out with --task"
            " image_to_image"
        )
