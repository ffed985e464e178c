"""Integrate a velocity from noise to data, or back."""

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from d2f_fast.config import FixedStepMethod, check_guidance
from d2f_fast.flow.flow import Flow
from d2f_fast.sampling.condition import Condition, guided_condition
from d2f_fast.sampling.options import check_image_guidance

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Velocity = Callable[[Tensor, Tensor], Tensor]


def sample_flow(
    velocity: Velocity,
    x_t: Tensor,
    steps: int = 4,
    times: Tensor | None = None,
    method: FixedStepMethod = "euler",
    return_intermediates: bool = False,
) -> Tensor | list[Tensor]:
    """Solve d x_t / d t = velocity(x_t, t) along `times`.

    Args:
        velocity: function of the flow state [B, ...] and the flow time ([] float32) that returns the velocity [B, ...].
        x_t: flow state at times[0]; at t = 0 it is noise from N(0, 1).
        steps: number of steps, at least 1, from t = 0 to t = 1 in equal parts; ignored where `times` is given.
        times: strictly monotone flow times in [0, 1], [steps + 1]; falling times go from data to noise (inversion).
            None for the uniform times of `steps`.
        method: integration method: "euler" evaluates the velocity once a step, "midpoint" and "heun" twice, and "rk4",
            the classical Runge-Kutta method of fourth order, four times; "heun" and "rk4" evaluate it at the end of
            each step, so at t = 1 too.
        return_intermediates: return the states at all times, times[0] included, in place of the last one alone.

    Returns:
        The state at times[-1], in the type of `x_t`; or the list of all steps + 1 states.

    Raises:
        ValueError: the method is unknown, `steps` is below 1, or the times are not strictly monotone or not in [0, 1].
    """
    if method not in get_args(FixedStepMethod):
        raise ValueError(f"method must be one of {get_args(FixedStepMethod)}, got {method!r}")
    times = monotone_times(times, steps).to(x_t.device)
    states = [x_t]
    for t, t_next in itertools.pairwise(times):
        state, step = states[-1], t_next - t
        slope = velocity(state, t)
        if method == "midpoint":
            slope = velocity(state + (step / 2) * slope, t + step / 2)
        elif method == "heun":
            slope = (slope + velocity(state + step * slope, t_next)) / 2
        elif method == "rk4":
            second = velocity(state + (step / 2) * slope, t + step / 2)
            third = velocity(state + (step / 2) * second, t + step / 2)
            slope = (slope + 2 * second + 2 * third + velocity(state + step * third, t_next)) / 6
        states.append((state + step * slope).to(x_t.dtype))
        if not return_intermediates:
            del states[0]
    return states if return_intermediates else states[-1]


def monotone_times(times: Tensor | None, steps: int) -> Tensor:
    """Return the flow times of an integration, [steps + 1] float32.

    Args:
        times: strictly monotone flow times in [0, 1], or None for the uniform times of `steps` from 0 to 1.
        steps: number of steps, at least 1; ignored where `times` is given.

    Raises:
        ValueError: `steps` is below 1, or the times are not strictly monotone or not in [0, 1].
    """
    if times is None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return torch.linspace(0, 1, steps + 1)
    widths = times.to("cpu", torch.float64).flatten().diff()
    if times.ndim != 1 or len(times) < 2 or not (bool((widths > 0).all()) or bool((widths < 0).all())):
        raise ValueError(f"times must be a strictly monotone tensor of at least two nodes, got {times.tolist()}")
    if not (min(times[0], times[-1]) >= 0 and max(times[0], times[-1]) <= 1):
        raise ValueError(f"times must be flow times in [0, 1], 0 for noise and 1 for data, got {times.tolist()}")
    return times.to(torch.float32)


def unet_velocity(
    unet: "UNet2DConditionModel",
    flow: Flow,
    encoder_hidden_states: Tensor,
    negative_hidden_states: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    context: Tensor | None = None,
    image_guidance_scale: float = 1.0,
    context_first: bool = True,
) -> Velocity:
    """Return the velocity of a conditional diffusers UNet, with classifier-free guidance in one batched call.

    With the text p, the negative text n, the context c and the scales s_T and s_I it is, as in InstructPix2Pix (Brooks
    et al., arXiv 2211.09800, equation 3),

        v(n, 0) + s_I (v(n, c) - v(n, 0)) + s_T (v(p, c) - v(n, c)).

    Args:
        unet: conditional UNet of diffusers.
        flow: `Alignment` or `NaiveFlow` that reads the UNet's output, on the UNet's device.
        encoder_hidden_states: text condition, [B, L, D].
        negative_hidden_states: text condition to steer away from, [B, L, D]; needed for a scale above 1.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off, and other values below 1 are refused. A
            tensor [B, 1, ...] gives each sample a scale of its own, at least 1, and always guides.
        added_cond_kwargs: further conditions of SDXL's UNet; with guidance they hold the negative ones first, then the
            positive ones. None for a UNet without them.
        guidance_interval: lowest and highest flow time, both included, at which guidance is on (Kynkäänniemi et al.,
            arXiv 2404.07724). Outside of it the UNet is called with the text condition and the context alone, in half
            the time. A narrower interval than the whole flow, (0, 1), reads the time back from the GPU at each
            evaluation.
        context: latents of the k images that the UNet sees beside its own latents, [B, k · C, h, w]; None for a UNet
            that sees none. Zeros stand for an image that is left out.
        image_guidance_scale: scale of the guidance by the images, at least 1. 1 turns it off; above, the UNet is
            evaluated on a third condition, without text and images.
        context_first: whether the UNet takes the context before its own latents, as Marigold's and those that are
            trained here do, and not after them, as InstructPix2Pix's does.

    Returns:
        A function of the flow state [B, ...] and the flow time, [] float32, for `sample_flow`. It also takes a flow
        time for each sample, [B], where guidance is not limited to an interval.

    Raises:
        RefusedInputError: `guidance_scale` is below 0, or between 0 and 1, or `image_guidance_scale` is below 1.
        ValueError: a scale is above 1 and there are no `negative_hidden_states`, or no `context` for the scale of the
            images, or `guidance_interval` is not two rising flow times.
    """
    check_image_guidance("image_guidance_scale", image_guidance_scale)
    guides = isinstance(guidance_scale, Tensor) or image_guidance_scale > 1
    if not isinstance(guidance_scale, Tensor):
        check_guidance("guidance_scale", guidance_scale)
        guides = guides or guidance_scale > 1
        guidance_scale = max(guidance_scale, 1.0)  # 0 means the text alone, too.
    lowest, highest = guidance_interval
    if not 0 <= lowest < highest <= 1:
        raise ValueError(f"guidance_interval must be two rising flow times in [0, 1], got {guidance_interval}")
    dtype = unet.conv_in.weight.dtype  # unet.dtype walks through every module.
    positive, added = encoder_hidden_states.to(dtype), dict(added_cond_kwargs or {})
    if guides:
        if negative_hidden_states is None:
            which = "guidance_scale" if image_guidance_scale == 1 else "image_guidance_scale"
            scale = guidance_scale if image_guidance_scale == 1 else image_guidance_scale
            raise ValueError(f"{which}={scale} needs negative_hidden_states")
        of_text = {name: value.chunk(2)[1] for name, value in added.items()}
        alone = Condition(positive, of_text, context, context_first)
        guided = guided_condition(alone, negative_hidden_states.to(dtype), added, image_guidance_scale > 1)
    else:
        guided = alone = Condition(positive, added, context, context_first)
    always = (lowest, highest) == (0, 1)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        condition = guided if always or lowest <= float(t) <= highest else alone
        sample = flow.to_sample(x_t, t)
        outputs = condition.evaluate(unet, sample.to(dtype), flow.timestep(t)).chunk(condition.copies)
        output = outputs[-1]
        if condition.copies > 1:
            # The velocity is linear in the network's output, so guidance of the output is guidance of the velocity.
            output = torch.lerp(outputs[-2].to(x_t.dtype), output.to(x_t.dtype), guidance_scale)
        if condition.copies > 2:
            output = output + (image_guidance_scale - 1) * (outputs[1].to(x_t.dtype) - outputs[0].to(x_t.dtype))
        return flow.velocity(output, sample, t).to(x_t.dtype)

    return velocity
