"""Generate pictures with a stock diffusers pipeline along flow time."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from d2f_fast.config import Method, PredictionType, Spacing
from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.scheduler import Diff2FlowScheduler


def generate(
    pipeline: Any,
    prompts: str | Sequence[str],
    *,
    num_inference_steps: int = 4,
    guidance_scale: float = 3.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
    method: Method = "euler",
    flow_spacing: Spacing = "uniform",
    shift: float = 1.0,
    prediction_type: PredictionType | None = None,
) -> list[Image.Image]:
    """Generate one picture for each prompt, from noise at t = 0 to data at t = 1.

    The pipeline's own call does the work, with `Diff2FlowScheduler` in place of its scheduler, which it has back
    afterwards.

    Args:
        pipeline: StableDiffusionPipeline, StableDiffusionXLPipeline or one that is called like them, on its device.
        prompts: one prompt, or several; one picture is generated for each.
        num_inference_steps: integration steps, at least 1; "midpoint" and "heun" evaluate the network twice a step.
        guidance_scale: scale of classifier-free guidance; 1 turns it off.
        negative_prompt: prompt to steer away from, the same for all pictures; "" for the pipeline's own empty prompt.
        height, width: size of the pictures in pixels; None for the pipeline's own size.
        generator: source of the noise; None for torch's global generator.
        method: integration method.
        flow_spacing: "uniform" steps in flow time, or "trailing", the flow times of DDIM's trailing timesteps.
        shift: factor on the sampling sigmas (1 - t) / t; 1 leaves them as they are.
        prediction_type: what the network predicts; None for what the pipeline's scheduler says.

    Returns:
        One RGB picture for each prompt.

    Raises:
        RefusedInputError: a size that is no multiple of the autoencoder's factor, or steps or a schedule that cannot
            be used.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    sizes = {"height": height, "width": width}
    for name, size in sizes.items():
        if size is not None and size % pipeline.vae_scale_factor:
            raise RefusedInputError(f"{name} must be a multiple of {pipeline.vae_scale_factor}, got {size}")
    if any(sizes.values()):  # given one of them, diffusers would take neither
        own = pipeline.unet.config.sample_size
        own_sizes = zip(sizes, own if isinstance(own, list | tuple) else (own, own), strict=True)
        sizes = {name: sizes[name] or side * pipeline.vae_scale_factor for name, side in own_sizes}
    options: dict[str, Any] = {"method": method, "flow_spacing": flow_spacing, "shift": shift}
    if prediction_type is not None:
        options["prediction_type"] = prediction_type
    stock = pipeline.scheduler
    try:
        scheduler = Diff2FlowScheduler.from_config(stock.config, **options)
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise RefusedInputError(str(error)) from error
    pipeline.scheduler = scheduler
    try:
        return pipeline(
            prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            # None: SDXL's own empty prompt is zeros, and not the encoded "".
            negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
            **sizes,
            generator=generator,
        ).images
    finally:
        pipeline.scheduler = stock
