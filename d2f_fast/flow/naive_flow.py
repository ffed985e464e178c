"""Naive flow matching: the flow of a network that predicts the velocity itself.

    form         timestep that the network is fed    output              used by
    diffusers    T * (1 - t)                         noise - latents     rectified-flow checkpoints, diffusers, ComfyUI
    published    t                                   latents - noise     code of Diff2Flow, arXiv 2506.02221

The state is the flow state x_t = t * latents + (1 - t) * noise in both forms.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self, get_args

import torch
from torch import Tensor

from d2f_fast.config import FlowForm
from d2f_fast.errors import ModelError
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import at_least_float32, naive_timestep, shifted_uniform_times
from d2f_fast.flow.scheduler_config import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class NaiveFlow(Flow):
    """Flow of a network that predicts the flow itself (`flow_prediction`), as diffusers' flow-matching models do.

    The network takes the flow state as it is (n = 1); nothing is aligned. This is naive flow matching, the paper's
    baseline, and the way rectified-flow checkpoints are read.

    Args:
        num_train_timesteps: number T by which the network's timestep exceeds 1 - t; "published" does not use it.
        form: "diffusers", where the network is fed T * (1 - t) and returns noise - latents, or "published", where it
            is fed t and returns latents - noise.

    Raises:
        ValueError: the form is unknown.
    """

    def __init__(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS, form: FlowForm = "diffusers") -> None:
        super().__init__("flow_prediction", num_train_timesteps, t_min=0.0, t_max=1.0)
        if form not in get_args(FlowForm):
            raise ValueError(f"fm_form must be one of {get_args(FlowForm)}, got {form!r}")
        self.form = form
        # The output is this factor times noise - latents.
        self._sign = 1.0 if form == "diffusers" else -1.0

    @classmethod
    def from_scheduler(cls, scheduler: "SchedulerMixin") -> Self:
        """Return the flow of the model that a diffusers scheduler for flow prediction belongs to.

        Args:
            scheduler: scheduler for which `predicts_flow` holds.

        Raises:
            ModelError: `num_train_timesteps` is not a positive whole number, or the form is unknown.
        """
        config: Mapping[str, object] = scheduler.config
        steps, form = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS), config.get("fm_form", "diffusers")
        if not isinstance(steps, int) or steps < 1 or form not in get_args(FlowForm):
            raise ModelError(
                f"{type(scheduler).__name__} has num_train_timesteps {steps!r} and fm_form {form!r}: correct its"
                " scheduler_config.json"
            )
        return cls(steps, "published" if form == "published" else "diffusers")

    def timestep(self, t: Tensor) -> Tensor:
        """Return T * (1 - t), or t in the published form."""
        t = at_least_float32(t)
        return naive_timestep(t, self.num_train_timesteps) if self.form == "diffusers" else t

    def flow_time(self, timestep: Tensor) -> Tensor:
        """Return 1 - timestep / T, or the timestep itself in the published form."""
        timestep = at_least_float32(timestep)
        return 1 - timestep / self.num_train_timesteps if self.form == "diffusers" else timestep

    def state_scale(self, t: Tensor) -> Tensor:
        """Return 1 for every t: the network takes the flow state as it is."""
        return torch.ones_like(at_least_float32(t))

    def latents_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1, ∓(1 - t) of x̂0 = x_t + (1 - t) * velocity."""
        t = at_least_float32(t)
        return torch.ones_like(t), self._sign * (t - 1)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 0, ∓1 of velocity = P * sample + Q * model_output."""
        p, q = super().velocity_coefficients(t)
        return p, self._sign * q

    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return latents - noise, which is ∓ the output; the state does not enter it."""
        return -model_output if self.form == "diffusers" else model_output

    def sigmas(self, steps: int, shift: float = 1.0) -> list[float]:
        """Return 1 - t at the uniform times, as diffusers' flow-matching schedulers count sigma; it ends in 0.0.

        Args:
            steps: number of steps, at least 1.
            shift: positive factor on (1 - t) / t at every time; 1 leaves the times as they are.

        Raises:
            ValueError: `steps` is below 1, or `shift` is not positive.
        """
        sigmas: list[float] = (1 - shifted_uniform_times(steps, self.t_min, shift)).tolist()
        return sigmas


def uses_published_form(flow: Flow) -> bool:
    """Return whether a flow's network is fed t and returns latents - noise."""
    return isinstance(flow, NaiveFlow) and flow.form == "published"
