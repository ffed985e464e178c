"""Build a stock `MarigoldDepthPipeline` of a network that was trained on depth, which loads without this package."""

from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, MarigoldDepthPipeline
from torch import Tensor

from d2f_fast.models.configs import TEXT_ENCODERS
from d2f_fast.models.depth_start import set_start
from d2f_fast.models.facts import same_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel

DEFAULT_STEPS = 4


@torch.no_grad()
def empty_text(pipeline: "DiffusionPipeline") -> Tensor:
    """Return the encoded empty prompt without padding, [1, 2, D], which is all the text that Marigold uses.

    Args:
        pipeline: Pipeline with one tokenizer and one text encoder.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    ids = tokenizer(
        "", padding="do_not_pad", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    encoded: Tensor = encoder(ids.to(encoder.device))[0]
    return encoded


def text_encoders_of(pipeline: "DiffusionPipeline") -> int:
    """Return the number of text encoders of a pipeline.

    Args:
        pipeline: Pipeline of the base model.
    """
    return sum(getattr(pipeline, name, None) is not None for name in TEXT_ENCODERS)


def depth_scheduler(scheduler: "SchedulerMixin") -> DDIMScheduler:
    """Return the stock scheduler of a depth model: DDIM with trailing timesteps, which ends at clean latents.

    Args:
        scheduler: Scheduler of the base model, whose noise table and prediction type are taken.
    """
    return same_schedule(
        scheduler,
        DDIMScheduler,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        thresholding=False,
        steps_offset=0,
    )


def marigold_pipeline(
    pipeline: "DiffusionPipeline",
    unet: "UNet2DConditionModel",
    scheduler: "SchedulerMixin",
    normalization: str,
    resolution: int,
    steps: int = DEFAULT_STEPS,
) -> MarigoldDepthPipeline:
    """Return the stock pipeline that predicts depth with a trained network.

    Args:
        pipeline: Pipeline of the base model, which gives the autoencoder, the text encoder and the tokenizer.
        unet: Network that sees the latents of an image before those of its depth.
        scheduler: Scheduler that samples it.
        normalization: Normalisation that it was trained with. Stock programs know "disparity", and take all others for
            depth; of "log", what they show is the logarithm.
        resolution: Longer side at which images are processed unless another one is asked for, in pixels.
        steps: Number of sampling steps unless another one is asked for.
    """
    return MarigoldDepthPipeline(
        unet=unet,
        vae=pipeline.vae,
        scheduler=scheduler,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        prediction_type="disparity" if normalization == "disparity" else "depth",
        scale_invariant=True,
        shift_invariant=True,
        default_denoising_steps=steps,
        default_processing_resolution=resolution,
    )


def set_default_steps(pipeline: MarigoldDepthPipeline, steps: int) -> None:
    """Set the number of sampling steps that a pipeline takes, and that its folder states, where none is given.

    Args:
        pipeline: Pipeline that predicts depth.
        steps: Number of sampling steps.
    """
    pipeline.register_to_config(default_denoising_steps=steps)
    pipeline.default_denoising_steps = steps


def settle_start(
    pipeline: MarigoldDepthPipeline, *, was_zeros: bool, from_zeros: bool, steps: int | None = None
) -> None:
    """Let a pipeline state how it starts after LoRA were merged into it, with a number of steps that fits.

    Args:
        pipeline: Pipeline that predicts depth.
        was_zeros: Whether the model started from zeros without the LoRA.
        from_zeros: Whether it starts from zeros with the LoRA, and so takes one step.
        steps: Number of sampling steps of what starts from noise on a model that started from zeros; None for 4.
    """
    if was_zeros or from_zeros:
        set_default_steps(pipeline, 1 if from_zeros else steps or DEFAULT_STEPS)
    set_start(pipeline.unet, from_zeros=from_zeros)
