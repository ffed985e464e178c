"""Integrate the flow of a base model for prompts, with solvers that no scheduler of diffusers runs, or backwards.

`sampling.generate` serves the methods of `Diff2FlowScheduler` through the stock pipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from d2f_fast.config import FixedStepMethod, SamplingMethod, StochasticMethod
from d2f_fast.flow.flow import Flow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.adaptive import sample_flow_adaptive
from d2f_fast.sampling.integrate import Velocity, sample_flow, unet_velocity
from d2f_fast.sampling.stochastic import sample_flow_stochastic


@dataclass(frozen=True)
class Solver:
    """How a flow is integrated.

    Args:
        method: integration method; "dopri5" chooses its own steps.
        rtol: tolerated error of a step of "dopri5", relative to the state.
        atol: tolerated error of a step of "dopri5" beside the relative one.
        diffusion: strength c of the random part of "euler_maruyama" and "stochastic_heun"; 0 turns it off.
    """

    method: SamplingMethod = "euler"
    rtol: float = 1e-5
    atol: float = 1e-6
    diffusion: float = 1.0

    def solve(
        self, velocity: Velocity, x_t: Tensor, times: Tensor, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Return the states at all times, [steps + 1] tensors of the shape of `x_t`.

        Args:
            velocity: velocity of the flow.
            x_t: flow state at times[0], [B, ...].
            times: strictly monotone flow times, [steps + 1]; only "dopri5" steps between them as it likes.
            generator: source of the random part; None for torch's global generator.

        Raises:
            RefusedInputError: "dopri5" needs torchdiffeq, and it is not installed.
            ValueError: an option is out of its range, or the times are not those of the method.
        """
        if self.method in get_args(FixedStepMethod):
            states = sample_flow(velocity, x_t, times=times, method=self.method, return_intermediates=True)  # type: ignore[arg-type]
        elif self.method in get_args(StochasticMethod):
            states = sample_flow_stochastic(
                velocity,
                x_t,
                times=times,
                method=self.method,  # type: ignore[arg-type]
                diffusion=self.diffusion,
                generator=generator,
                return_intermediates=True,
            )
        else:
            states = sample_flow_adaptive(velocity, x_t, times, self.rtol, self.atol, return_intermediates=True)
        return list(states)


def prompt_velocity(
    model: BaseModel,
    flow: Flow,
    prompts: Sequence[str],
    height: int,
    width: int,
    guidance_scale: float | Tensor = 1.0,
    negative: Mapping[str, Tensor] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Return the velocity of a base model for a batch of prompts.

    Args:
        model: base model on its device.
        flow: flow of its network, on the same device.
        prompts: B prompts.
        height: height of the images, in pixels; SDXL is conditioned on it.
        width: width of the images, in pixels.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off. A tensor [B, 1, 1, 1] gives each image a
            scale of its own.
        negative: condition to steer away from, of one prompt, as `encode_prompts` returns it; None for the model's own
            empty prompt.
        guidance_interval: lowest and highest flow time at which guidance is on.

    Raises:
        RefusedInputError: `guidance_scale` is below 0, or between 0 and 1.
        ValueError: `guidance_interval` is not two rising flow times.
    """
    positive = model.encode_prompts(prompts)
    added = model.added_cond_kwargs(positive, height, width)
    hidden = positive["encoder_hidden_states"]
    if not isinstance(guidance_scale, Tensor) and guidance_scale <= 1:
        return unet_velocity(model.unet, flow, hidden, None, guidance_scale, added, guidance_interval)
    one = model.empty_condition() if negative is None else negative
    other = {name: value.expand(len(prompts), *value.shape[1:]) for name, value in one.items()}
    if added is not None:
        of_other = model.added_cond_kwargs(other, height, width) or {}
        added = {name: torch.cat([of_other[name], added[name]]) for name in added}
    away = other["encoder_hidden_states"]
    return unet_velocity(model.unet, flow, hidden, away, guidance_scale, added, guidance_interval)
