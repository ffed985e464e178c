"""`generate`: generate images with a stock diffusers pipeline along flow time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image

from d2f_fast.config import FlowForm, Method, PredictionType, Spacing, check_guidance
from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.options import check_negative_prompt, check_steps, complete_size, image_size
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


def generate(
    pipeline: "Pipeline",
    prompts: str | Sequence[str],
    *,
    num_inference_steps: int = 4,
    guidance_scale: float = 3.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    method: Method = "euler",
    flow_spacing: Spacing = "uniform",
    shift: float | None = None,
    prediction_type: PredictionType | None = None,
    fm_form: FlowForm | None = None,
) -> list[Image.Image]:
    """Generate one image for each prompt, from noise at t = 0 to data at t = 1.

    The pipeline's own call does the work, with a `Diff2FlowScheduler` in place of the pipeline's scheduler, which is
    put back afterwards.

    Args:
        pipeline: Stable Diffusion or SDXL pipeline, or one that is called like them, on its device.
        prompts: one prompt, or several; one image is generated for each.
        num_inference_steps: number of integration steps, at least 1; "midpoint" and "heun", which need 2, evaluate the
            network twice in every step but the last one.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off, and other values below 1 are refused.
        negative_prompt: prompt to steer away from, the same for all images; it needs a `guidance_scale` above 1. "" for
            the pipeline's own empty prompt.
        height: height of the images in pixels; None for the pipeline's own.
        width: width of the images in pixels; None for the pipeline's own.
        generator: source of the noise, on the pipeline's device or the CPU, or a list of one for each prompt; None for
            torch's global generator.
        method: integration method: "euler", "midpoint" or "heun".
        flow_spacing: "uniform" steps in flow time, or "trailing", the flow times of DDIM's trailing timesteps.
        shift: positive factor on the sampling sigmas (1 - t) / t, 1 for none; None for the shift in the configuration
            of the pipeline's scheduler (the `shift` or `flow_shift` of a flow-matching scheduler, 1 of others).
        prediction_type: what the network predicts; None for what the configuration of the pipeline's scheduler says.
        fm_form: form of "flow_prediction", "diffusers" or "published"; None for that of the configuration, which is
            "diffusers" for every stock scheduler.

    Returns:
        One RGB image for each prompt.

    Raises:
        RefusedInputError: the pipeline cannot generate images of this size, or the steps, the guidance scale, the
            shift or the scheduler's configuration cannot be used.
    """
    check_guidance("guidance_scale", guidance_scale)
    check_negative_prompt(negative_prompt, guidance_scale)
    check_steps(method, num_inference_steps)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    own_size = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    # The pipeline has read its own size when it was made, and may not know one that is not a square.
    height, width = complete_size(*image_size(height, width, *own_size), *own_size)
    given = {"shift": shift, "prediction_type": prediction_type, "fm_form": fm_form}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        scheduler = Diff2FlowScheduler.from_config(
            pipeline.scheduler.config, method=method, flow_spacing=flow_spacing, **options
        )
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise RefusedInputError(str(error)) from error
    with _scheduled(pipeline, scheduler):
        images: list[Image.Image] = pipeline(
            prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            # SDXL's own empty prompt, for which None stands, is zeros and not the encoded "".
            negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
            height=height,
            width=width,
            generator=generator,
        ).images
    return images


@contextmanager
def _scheduled(pipeline: "Pipeline", scheduler: Diff2FlowScheduler) -> Iterator[None]:
    """Return a context in which the pipeline has another scheduler."""
    stock = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = stock
