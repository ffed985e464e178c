"""Generate images with the network of a run."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from PIL import Image

from d2f_fast.config import TrainingConfig
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.generate import generate
from d2f_fast.training.network import inputs_in_float32


def generate_trained(
    model: BaseModel,
    config: TrainingConfig,
    prompts: str | Sequence[str],
    height: int | None,
    width: int | None,
    **options: Any,
) -> list[Image.Image]:
    """Generate one image for each prompt with the weights that a network holds, with the shift of the run.

    Args:
        model: base model of the run, with the trained network.
        config: options of the run.
        prompts: one prompt, or several.
        height: height of the images in pixels; None for the training resolution.
        width: width of the images in pixels; None for the training resolution.
        options: further arguments of `generate`.

    Raises:
        RefusedInputError: the images cannot be generated; see `generate`.
    """
    with inputs_in_float32(model.unet) if config.adapter == "full" else nullcontext():
        return generate(
            model.pipeline,
            prompts,
            height=height or config.resolution,
            width=width or config.resolution,
            shift=config.recommended_shift,
            prediction_type="flow_prediction" if config.objective == "fm" else None,
            fm_form=config.fm_form,
            **options,
        )
