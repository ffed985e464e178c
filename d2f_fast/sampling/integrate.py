"""Integrate a velocity from noise to data, or back."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from d2f_fast.config import Method
from d2f_fast.flow.formulas import Flow

Velocity = Callable[[Tensor, Tensor], Tensor]


def sample_flow(
    velocity: Velocity,
    x_t: Tensor,
    steps: int = 4,
    times: Tensor | None = None,
    method: Method = "euler",
    return_intermediates: bool = False,
) -> Tensor | list[Tensor]:
    """Solve d x_t / d t = velocity(x_t, t) along `times`.

    Args:
        velocity: maps the flow state [B, ...] and t ([] float32) to the velocity [B, ...].
        x_t: state at times[0]; noise N(0, 1) at t = 0.
        steps: number of steps where `times` is not given; then t = 0, 1/steps, … 1.
        times: [steps + 1] monotone flow times; falling ones go from data to noise (inversion).
        method: "euler" one evaluation a step; "midpoint" and "heun" two (Heun's last one at t = 1 included).
        return_intermediates: also the states at every node, times[0] included.

    Returns:
        The state at times[-1], in the type of `x_t`; or the list of states, [steps + 1] of them.

    Raises:
        ValueError: an unknown method, fewer than one step, or times that are not monotone.
    """
    if times is None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        times = torch.linspace(0, 1, steps + 1)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    widths = times.to("cpu", torch.float64).flatten().diff()
    if times.ndim != 1 or len(times) < 2 or not (bool((widths > 0).all()) or bool((widths < 0).all())):
        raise ValueError(f"times must be a strictly monotone tensor of at least two nodes, got {times.tolist()}")
    times = times.to(x_t.device, torch.float32)
    states = [x_t]
    for t, t_next in itertools.pairwise(times):
        state, step = states[-1], t_next - t
        slope = velocity(state, t)
        if method == "midpoint":
            slope = velocity(state + (step / 2) * slope, t + step / 2)
        elif method == "heun":
            slope = (slope + velocity(state + step * slope, t_next)) / 2
        states.append((state + step * slope).to(x_t.dtype))
        if not return_intermediates:
            del states[0]
    return states if return_intermediates else states[-1]


def unet_velocity(
    unet: Any,
    flow: Flow,
    encoder_hidden_states: Tensor,
    negative_hidden_states: Tensor | None = None,
    guidance_scale: float = 1.0,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> Velocity:
    """Velocity of a conditional diffusers UNet, classifier-free guidance in one batched call.

    Args:
        unet: UNet2DConditionModel.
        flow: how its output is read: an `Alignment` or `NaiveFlow` on the UNet's device.
        encoder_hidden_states: [B, L, D] condition.
        negative_hidden_states: [B, L, D] condition to lead away from; needed where `guidance_scale` is not 1.
        guidance_scale: 1 is no guidance.
        added_cond_kwargs: of the UNet, for SDXL; already doubled (negative first) where guidance is used.

    Raises:
        ValueError: guidance without `negative_hidden_states`.
    """
    guided = guidance_scale != 1.0
    if guided and negative_hidden_states is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs negative_hidden_states")
    condition = torch.cat([negative_hidden_states, encoder_hidden_states]) if guided else encoder_hidden_states  # type: ignore[list-item]
    dtype = unet.dtype
    condition = condition.to(dtype)
    extra = {} if added_cond_kwargs is None else {"added_cond_kwargs": dict(added_cond_kwargs)}

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        sample = flow.to_sample(x_t, t)
        given = torch.cat([sample, sample]) if guided else sample
        timestep = flow.timestep(t)
        output = unet(given.to(dtype), timestep, encoder_hidden_states=condition, **extra, return_dict=False)[0]
        if guided:
            negative, positive = output.chunk(2)
            # In the model's own output: velocity is linear in it, so this is guidance of the velocity.
            output = torch.lerp(negative.to(x_t.dtype), positive.to(x_t.dtype), guidance_scale)
        return flow.velocity(output, sample, t).to(x_t.dtype)

    return velocity
