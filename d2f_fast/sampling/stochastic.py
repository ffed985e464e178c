"""Integrate the stochastic equation whose states have, at each flow time, the distribution of the flow's.

The flow's velocity v and its state x_t imply the noise x_t - t v, and so the score -(x_t - t v) / (1 - t) of the
state's distribution. With the diffusion g² = 2 c (1 - t), c >= 0, the equation

    d x_t = (v + g² / 2 score) d t + g d W = (v - c (x_t - t v)) d t + sqrt(2 c (1 - t)) d W

keeps every marginal distribution (Song et al., arXiv 2011.13456; Ma et al., SiT, arXiv 2401.08740), needs one velocity
and is regular at both ends; at c = 0 it is the flow itself.
"""

import itertools
from typing import get_args

import torch
from torch import Tensor

from d2f_fast.config import StochasticMethod
from d2f_fast.sampling.integrate import Velocity, monotone_times


def sample_flow_stochastic(
    velocity: Velocity,
    x_t: Tensor,
    steps: int = 50,
    times: Tensor | None = None,
    method: StochasticMethod = "euler_maruyama",
    diffusion: float = 1.0,
    generator: torch.Generator | None = None,
    return_intermediates: bool = False,
) -> Tensor | list[Tensor]:
    """Solve d x_t = (v - c (x_t - t v)) d t + sqrt(2 c (1 - t)) d W with v = velocity(x_t, t) and c = `diffusion`.

    The random part of a step has its exact variance, c ((1 - t)² - (1 - t')²). A step that ends at t = 1 is taken
    without it, along the flow, and so ends at the latents that the velocity implies.

    Args:
        velocity: function of the flow state [B, ...] and the flow time ([] float32) that returns the velocity [B, ...].
        x_t: flow state at times[0]; at t = 0 it is noise from N(0, 1).
        steps: number of steps, at least 1, from t = 0 to t = 1 in equal parts; ignored where `times` is given.
        times: rising flow times, [steps + 1]. None for the uniform times of `steps`.
        method: "euler_maruyama" evaluates the velocity once a step, "stochastic_heun" twice.
        diffusion: factor c on the squared strength of the random part; 0 turns it off.
        generator: source of the random part, on the device of `x_t` or the CPU; None for torch's global generator.
        return_intermediates: return the states at all times, times[0] included, in place of the last one alone.

    Returns:
        The state at times[-1], in the type of `x_t`; or the list of all steps + 1 states.

    Raises:
        ValueError: the method is unknown, `diffusion` is negative, `steps` is below 1, or the times do not rise.
    """
    if method not in get_args(StochasticMethod):
        raise ValueError(f"method must be one of {get_args(StochasticMethod)}, got {method!r}")
    if not diffusion >= 0:
        raise ValueError(f"diffusion must not be negative, got {diffusion}")
    nodes = monotone_times(times, steps)
    if nodes[0] > nodes[-1]:
        raise ValueError(f"times must rise, because noise cannot be taken back, got {nodes.tolist()}")

    def drift(state: Tensor, t: Tensor) -> Tensor:
        slope = velocity(state, t)
        return slope - diffusion * (state - t * slope)

    on_device = nodes.to(x_t.device)
    states = [x_t]
    for (at, at_next), (t, t_next) in zip(
        itertools.pairwise(nodes.tolist()), itertools.pairwise(on_device), strict=True
    ):
        state = states[-1]
        step = at_next - at
        if at_next == 1:
            moved = state + step * velocity(state, t)
        else:
            spread = (diffusion * ((1 - at) ** 2 - (1 - at_next) ** 2)) ** 0.5
            device = x_t.device if generator is None else generator.device
            random = spread * torch.randn(x_t.shape, generator=generator, device=device).to(x_t)
            slope = drift(state, t)
            if method == "stochastic_heun":
                slope = (slope + drift(state + step * slope + random, t_next)) / 2
            moved = state + step * slope + random
        states.append(moved.to(x_t.dtype))
        if not return_intermediates:
            del states[0]
    return states if return_intermediates else states[-1]
