"""Generate images with solvers that no scheduler of diffusers runs, show the way, and go it backwards.

`sampling.generate` serves the methods of `Diff2FlowScheduler` through the stock pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from d2f_fast.config import SamplingMethod, Spacing, check_guidance
from d2f_fast.errors import RefusedInputError
from d2f_fast.flow.flow import Flow
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.image_context import check_sampling_context, fit_pixels
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.integrate import Velocity
from d2f_fast.sampling.options import (
    check_image_guidance,
    check_negative_prompt,
    check_steps,
    complete_size,
    image_size,
)
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.sampling.solve import solve
from d2f_fast.sampling.solver_options import SolverOptions

# Called with the number of the state, its flow time, and its images, from the start on.
OnState = Callable[[int, float, list[Image.Image]], object]


@dataclass(frozen=True)
class Sampling:
    """How images are generated.

    Args:
        method: integration method.
        solver: options of the method and of guidance.
        num_inference_steps: number of integration steps, at least 1; "midpoint" and "heun" need 2. "dopri5" chooses its
            own steps, and is only asked for its states at these.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off, and other values below 1 are refused.
        negative_prompt: prompt to steer away from, with guidance; "" for the model's own empty prompt.
        height: height of the images in pixels; None for the model's own.
        width: width of the images in pixels; None for the model's own.
        flow_spacing: spacing of the steps.
        scheduler_options: prediction type, form and shift that replace those of the model's scheduler, by the names of
            `Diff2FlowScheduler`.
        image_guidance_scale: scale of the guidance by the images that the network sees, at least 1, which turns it off.
    """

    method: SamplingMethod = "euler"
    solver: SolverOptions = field(default_factory=SolverOptions)
    num_inference_steps: int = 4
    guidance_scale: float = 3.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    flow_spacing: Spacing = "uniform"
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    image_guidance_scale: float = 1.0

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            RefusedInputError: An option cannot be used; the message says what to change.
        """
        check_guidance("guidance_scale", self.guidance_scale)
        check_image_guidance("image_guidance_scale", self.image_guidance_scale)
        largest = max(self.guidance_scale, self.image_guidance_scale)
        check_negative_prompt(self.negative_prompt, largest)
        check_steps(self.method, self.num_inference_steps)
        self.solver.check(self.method, largest)


def generate_images(
    model: BaseModel,
    prompts: Sequence[str],
    sampling: Sampling,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    on_state: OnState | None = None,
    context: Tensor | None = None,
) -> list[Image.Image]:
    """Generate one image for each prompt, from noise at t = 0 to data at t = 1.

    Args:
        model: base model on its device.
        prompts: B prompts.
        sampling: how they are generated.
        generator: source of the noise, on the model's device or the CPU; None for torch's global generator.
        noise: flow state at t = 0 in place of random noise, [B, C, h, w]; None for random noise.
        on_state: function that is called with the number, flow time and images of each state; None for none.
        context: latents of the k images that the network sees, [B, k · C, h, w]; see `encode_context`. None for a
            network that sees none.

    Returns:
        One RGB image for each prompt.

    Raises:
        RefusedInputError: the model cannot generate images of this size, or an option cannot be used.
    """
    sampling.check()
    sees_images = context is not None or model.context_images > 0
    if noise is None and on_state is None and not (sees_images or sampling.solver.needs_solver(sampling.method)):
        return generate(
            model.pipeline,
            prompts,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            negative_prompt=sampling.negative_prompt,
            height=sampling.height,
            width=sampling.width,
            generator=generator,
            method=sampling.method,  # type: ignore[arg-type]
            flow_spacing=sampling.flow_spacing,
            **sampling.scheduler_options,
        )
    height, width = images_size(model, sampling)
    shape = (len(prompts), *model.latents_shape(height, width))
    check_sampling_context(model, context, shape)
    if noise is None:
        noise = randn_tensor(shape, generator=generator, device=model.device, dtype=torch.float32)
    elif noise.shape != shape:
        raise RefusedInputError(
            f"noise must have shape {list(shape)} for {len(prompts)} prompts of {width} x {height} pixels, got"
            f" {list(noise.shape)}: give the size and the number of prompts that it was made with"
        )
    flow, times = _path(model, sampling)
    with torch.no_grad():
        velocity = _velocity(model, flow, prompts, sampling, height, width, context)
        states = solve(velocity, noise.to(model.device), times, sampling.method, sampling.solver, generator)
        for number, (t, state) in enumerate(zip(times.tolist(), states, strict=True)):
            if on_state is not None:
                on_state(number, t, to_pil(model.decode(state)))
        return to_pil(model.decode(states[-1]))


def invert_images(
    model: BaseModel,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    sampling: Sampling,
    context: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Follow the flow of images back to the noise that they come from.

    Args:
        model: base model on its device.
        images: B images of mode RGB. Each is resized and cropped in the middle to the size of `sampling`.
        prompts: their B prompts.
        sampling: how the flow is followed. Methods that add noise are refused.
        context: latents of the k images that the network sees, [B, k · C, h, w]; None for a network that sees none.

    Returns:
        The noise, [B, C, h, w] float32, and the relative error of the latents that are generated from it again.

    Raises:
        RefusedInputError: the model has no images of this size, or an option cannot be used.
    """
    sampling.check()
    if sampling.method in ("euler_maruyama", "stochastic_heun"):
        raise RefusedInputError(
            f"method {sampling.method} adds noise and cannot be inverted: give another method, such as rk4"
        )
    if len(images) != len(prompts):
        raise RefusedInputError(f"give one prompt for each image, got {len(prompts)} for {len(images)}")
    height, width = images_size(model, sampling)
    check_sampling_context(model, context, (len(prompts), *model.latents_shape(height, width)))
    pixels = fit_pixels(images, height, width)
    flow, times = _path(model, sampling)
    with torch.no_grad():
        latents = model.scale_latents(model.encode_images(pixels)["mean"]).float()
        velocity = _velocity(model, flow, prompts, sampling, height, width, context)
        noise = solve(velocity, latents, times.flip(0), sampling.method, sampling.solver)[-1]
        again = solve(velocity, noise, times, sampling.method, sampling.solver)[-1]
    return noise, float((again - latents).norm() / latents.norm())


def images_size(model: BaseModel, sampling: Sampling) -> tuple[int, int]:
    """Return the height and the width in pixels of the images that are generated.

    Args:
        model: base model.
        sampling: how they are generated.

    Raises:
        RefusedInputError: the model cannot generate images of this size.
    """
    given = image_size(sampling.height, sampling.width, model.unet.config.sample_size, model.downsampling)
    return complete_size(*given, model.unet.config.sample_size, model.downsampling)


def _path(model: BaseModel, sampling: Sampling) -> tuple[Flow, Tensor]:
    """Return the flow of the model, on its device, and the flow times of the steps."""
    try:
        scheduler = Diff2FlowScheduler.from_config(
            model.pipeline.scheduler.config, flow_spacing=sampling.flow_spacing, **sampling.scheduler_options
        )
        shift = float(scheduler.config["shift"])
        times = scheduler.flow.times(sampling.num_inference_steps, sampling.flow_spacing, shift)
    except ValueError as error:
        raise RefusedInputError(str(error)) from error
    return scheduler.flow.to(model.device), times


def _velocity(
    model: BaseModel,
    flow: Flow,
    prompts: Sequence[str],
    sampling: Sampling,
    height: int,
    width: int,
    context: Tensor | None,
) -> Velocity:
    """Return the velocity of the model for prompts, and for the images that it sees."""
    negative = model.encode_prompts([sampling.negative_prompt]) if sampling.negative_prompt else None
    interval = sampling.solver.guidance_interval or (0.0, 1.0)
    given = model, flow, prompts, height, width, sampling.guidance_scale, negative, interval
    return prompt_velocity(*given, None if context is None else context.to(model.device), sampling.image_guidance_scale)
