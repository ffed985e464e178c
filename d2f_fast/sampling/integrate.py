"""Integrate a velocity from noise to data, or back."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from d2f_fast.config import FixedStepMethod, check_guidance
from d2f_fast.flow.flow import Flow

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Condition:
    """Conditions of one call of a UNet, in the order of its batch."""

    encoder_hidden_states: Tensor
    added: dict[str, Tensor]


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
) -> Velocity:
    """Return the velocity of a conditional diffusers UNet, with classifier-free guidance in one batched call.

    Args:
        unet: conditional UNet of diffusers.
        flow: `Alignment` or `NaiveFlow` that reads the UNet's output, on the UNet's device.
        encoder_hidden_states: text condition, [B, L, D].
        negative_hidden_states: text condition to steer away from, [B, L, D]; needed for a `guidance_scale` above 1.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off, and other values below 1 are refused. A
            tensor [B, 1, ...] gives each sample a scale of its own, at least 1, and always guides.
        added_cond_kwargs: further conditions of SDXL's UNet; with guidance they hold the negative ones first, then the
            positive ones. None for a UNet without them.
        guidance_interval: lowest and highest flow time, both included, at which guidance is on (Kynkäänniemi et al.,
            arXiv 2404.07724). Outside of it the UNet is called with the text condition alone, in half the time. A
            narrower interval than the whole flow, (0, 1), reads the time back from the GPU at each evaluation.

    Returns:
        A function of the flow state [B, ...] and the flow time, [] float32, for `sample_flow`. It also takes a flow
        time for each sample, [B], where guidance is not limited to an interval.

    Raises:
        RefusedInputError: `guidance_scale` is below 0, or between 0 and 1.
        ValueError: `guidance_scale` is above 1 and there are no `negative_hidden_states`, or `guidance_interval` is not
            two rising flow times.
    """
    guides = isinstance(guidance_scale, Tensor)
    if not isinstance(guidance_scale, Tensor):
        check_guidance("guidance_scale", guidance_scale)
        guides = guidance_scale > 1
    lowest, highest = guidance_interval
    if not 0 <= lowest < highest <= 1:
        raise ValueError(f"guidance_interval must be two rising flow times in [0, 1], got {guidance_interval}")
    if guides and negative_hidden_states is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs negative_hidden_states")
    dtype = unet.conv_in.weight.dtype  # unet.dtype walks through every module.
    alone = _Condition(encoder_hidden_states.to(dtype), dict(added_cond_kwargs or {}))
    both = alone
    if guides:
        both = _Condition(torch.cat([negative_hidden_states, encoder_hidden_states]).to(dtype), alone.added)  # type: ignore[list-item]
        alone = replace(alone, added={name: value.chunk(2)[1] for name, value in alone.added.items()})
    always = (lowest, highest) == (0, 1)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        guided = guides and (always or lowest <= float(t) <= highest)
        condition = both if guided else alone
        extra = {"added_cond_kwargs": condition.added} if condition.added else {}
        sample = flow.to_sample(x_t, t)
        given = torch.cat([sample, sample]) if guided else sample
        timestep = flow.timestep(t)
        if guided and timestep.ndim:
            timestep = torch.cat([timestep, timestep])
        hidden = condition.encoder_hidden_states
        output = unet(given.to(dtype), timestep, encoder_hidden_states=hidden, **extra, return_dict=False)[0]
        if guided:
            negative, positive = output.chunk(2)
            # The velocity is linear in the network's output, so guidance of the output is guidance of the velocity.
            output = torch.lerp(negative.to(x_t.dtype), positive.to(x_t.dtype), guidance_scale)
        return flow.velocity(output, sample, t).to(x_t.dtype)

    return velocity
