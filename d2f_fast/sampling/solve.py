"""Integrate a velocity by the name of the method, and return the states along the way."""

from typing import get_args

import torch
from torch import Tensor

from d2f_fast.config import SamplingMethod, StochasticMethod
from d2f_fast.sampling.adaptive import sample_flow_adaptive
from d2f_fast.sampling.integrate import Velocity, sample_flow
from d2f_fast.sampling.solver_options import DEFAULT_ATOL, DEFAULT_DIFFUSION, DEFAULT_RTOL, SolverOptions
from d2f_fast.sampling.stochastic import sample_flow_stochastic


def solve(
    velocity: Velocity,
    x_t: Tensor,
    times: Tensor,
    method: SamplingMethod = "euler",
    options: SolverOptions | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return the flow states at all times, [steps + 1] tensors of the shape of `x_t`.

    Args:
        velocity: velocity of the flow.
        x_t: flow state at times[0], [B, ...].
        times: strictly monotone flow times, [steps + 1]; only "dopri5" steps between them as it likes.
        method: integration method. "midpoint" and "heun" end at t = 1 with an Euler step, as `Diff2FlowScheduler` does.
        options: options of the method; None for the defaults.
        generator: source of the random part of "euler_maruyama" and "stochastic_heun"; None for torch's global one.

    Raises:
        RefusedInputError: "dopri5" needs torchdiffeq, and it is not installed.
        ValueError: the times are not strictly monotone, or fall for a method that adds noise.
    """
    options = options or SolverOptions()
    states: list[Tensor] | Tensor
    if method in get_args(StochasticMethod):
        strength = DEFAULT_DIFFUSION if options.diffusion is None else options.diffusion
        given = {"method": method, "diffusion": strength, "generator": generator, "return_intermediates": True}
        states = sample_flow_stochastic(velocity, x_t, times=times, **given)  # type: ignore[arg-type]
    elif method == "dopri5":
        rtol, atol = options.rtol or DEFAULT_RTOL, options.atol or DEFAULT_ATOL
        states = sample_flow_adaptive(velocity, x_t, times, rtol, atol, return_intermediates=True)
    elif method in ("midpoint", "heun") and len(times) > 2 and times[-1] == 1:
        states = sample_flow(velocity, x_t, times=times[:-1], method=method, return_intermediates=True)
        states = [*states, *list(sample_flow(velocity, states[-1], times=times[-2:], return_intermediates=True))[1:]]
    else:
        states = sample_flow(velocity, x_t, times=times, method=method, return_intermediates=True)  # type: ignore[arg-type]
    return list(states)
