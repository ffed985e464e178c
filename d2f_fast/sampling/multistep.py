"""DPM-Solver++ of second order along flow time: two orders of accuracy from one network evaluation a step.

    x' = r x + (1 - r) D,   r = (1 - t') / (1 - t),   D = x̂0 + h' / (2 h) (x̂0 - x̂0 of the step before)

h is the width of the step before in λ = log(t / (1 - t)), and h' that of this step. DPM-Solver++, arXiv 2211.01095,
algorithm 2 (multistep), restated for the flow state x = t latents + (1 - t) noise. λ is infinite at both ends: the
second step, after t = 0, and the last one, to t = 1, use x̂0 alone, as diffusers does in its last step.
"""

import itertools

import torch
from torch import Tensor

from d2f_fast.sampling.integrate import Velocity


def sample_multistep(velocity: Velocity, x_t: Tensor, times: Tensor) -> Tensor:
    """Solve d x_t / d t = velocity(x_t, t) with DPM-Solver++(2M).

    Args:
        velocity: function of the flow state [B, ...] and the flow time ([] float32) that returns the velocity [B, ...].
        x_t: flow state at times[0], [B, ...]; at t = 0 it is noise from N(0, 1).
        times: rising flow times in [0, 1], [steps + 1].

    Returns:
        The state at times[-1], in the type of `x_t`.

    Raises:
        ValueError: the times do not rise, or lie outside [0, 1].
    """
    nodes = times.to("cpu", torch.float64)
    if nodes.ndim != 1 or len(nodes) < 2 or nodes[0] < 0 or nodes[-1] > 1 or not bool((nodes.diff() > 0).all()):
        raise ValueError(f"times must rise from 0 or later to 1 or earlier, got {times.tolist()}")
    widths = torch.logit(nodes).diff().tolist()
    state, before = x_t, x_t
    for step, (t, t_next) in enumerate(itertools.pairwise(nodes.tolist())):
        now = torch.tensor(t, dtype=torch.float32, device=x_t.device)
        latents = state + (1 - t) * velocity(state, now)
        estimate = latents
        if step > 0 and t_next < 1 and widths[step - 1] < float("inf"):
            estimate = latents + widths[step] / (2 * widths[step - 1]) * (latents - before)
        ratio = (1 - t_next) / (1 - t)
        state, before = (ratio * state + (1 - ratio) * estimate).to(x_t.dtype), latents
    return state
