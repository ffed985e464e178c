"""Naive flow matching: a network that predicts the flow itself."""

import torch
from torch import Tensor

from d2f_fast.config import Spacing
from d2f_fast.flow.formulas import (
    at_least_float32,
    combine,
    interpolate,
    naive_timestep,
    shifted_uniform_times,
    velocity_coefficients,
)


class NaiveFlow:
    """A network that predicts the flow itself (`flow_prediction`, noise - latents, as diffusers' flow-matching models
    do).

    The state is x_t, the timestep T * (1 - t), and nothing is aligned: naive flow matching, the paper's baseline, and
    the way rectified-flow checkpoints are read.
    """

    prediction_type = "flow_prediction"
    t_min = 0.0
    t_max = 1.0

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def to(self, device: torch.device | str) -> "NaiveFlow":
        """Itself: there is no table to move."""
        return self

    def rising_flow_times(self, dtype: torch.dtype) -> None:
        """None: there is no table."""

    def timestep(self, t: Tensor) -> Tensor:
        """T * (1 - t)."""
        return naive_timestep(at_least_float32(t), self.num_train_timesteps)

    def flow_time(self, timestep: Tensor) -> Tensor:
        """1 - timestep / T."""
        return 1 - at_least_float32(timestep) / self.num_train_timesteps

    def interpolate(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Flow state t * latents + (1 - t) * noise."""
        return interpolate(latents, noise, t)

    def state_scale(self, t: Tensor) -> Tensor:
        """1: the network is given the flow state as it is."""
        return torch.ones_like(at_least_float32(t))

    def to_sample(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The flow state itself."""
        return x_t

    def to_flow(self, sample: Tensor, t: Tensor) -> Tensor:
        """The flow state itself."""
        return sample

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """P = 0, Q = -1: diffusers' flow prediction is noise - latents."""
        return velocity_coefficients(at_least_float32(t), self.prediction_type, self.t_min, self.t_max)

    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Flow velocity latents - noise, the negative of the output."""
        return -model_output

    def predicted_latents(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """x̂0 = x_t - (1 - t) * model_output."""
        t = at_least_float32(t)
        return combine(torch.ones_like(t), sample, t - 1, model_output)

    def model_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """noise - latents."""
        return noise - latents

    def times(self, steps: int, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor:
        """Uniform nodes 0 … 1, shifted, [steps + 1] float32; there are no trailing timesteps without a table."""
        if spacing != "uniform":
            raise ValueError(f'spacing must be "uniform" for flow_prediction, got {spacing!r}')
        return shifted_uniform_times(steps, 0.0, shift).float()
