"""Naive flow matching: the flow of a network that predicts the velocity itself."""

import torch
from torch import Tensor

from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import at_least_float32, naive_timestep


class NaiveFlow(Flow):
    """Flow of a network that predicts noise - latents (`flow_prediction`), as diffusers' flow-matching models do.

    The network takes the flow state as it is (n = 1) and the timestep T * (1 - t); nothing is aligned. This is naive
    flow matching, the paper's baseline, and the way rectified-flow checkpoints are read.

    Args:
        num_train_timesteps: number T by which the network's timestep exceeds 1 - t.
    """

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        super().__init__("flow_prediction", num_train_timesteps, t_min=0.0, t_max=1.0)

    def timestep(self, t: Tensor) -> Tensor:
        """Return T * (1 - t)."""
        return naive_timestep(at_least_float32(t), self.num_train_timesteps)

    def flow_time(self, timestep: Tensor) -> Tensor:
        """Return 1 - timestep / T."""
        return 1 - at_least_float32(timestep) / self.num_train_timesteps

    def state_scale(self, t: Tensor) -> Tensor:
        """Return 1 for every t: the network takes the flow state as it is."""
        return torch.ones_like(at_least_float32(t))

    def latents_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1, t - 1 of x̂0 = x_t + (1 - t) * velocity = x_t - (1 - t) * model_output."""
        t = at_least_float32(t)
        return torch.ones_like(t), t - 1

    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return latents - noise, the negative of the output; the state does not enter it."""
        return -model_output
