"""`Flow`, the base class of the two objects that map a network's own time and output to flow time and velocity."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from d2f_fast.config import Spacing
from d2f_fast.flow import formulas
from d2f_fast.flow.formulas import at_least_float32, combine, over_latents


class Flow(ABC):
    """Map between a network's timestep, state and output on one side, and flow time and velocity on the other.

    `Alignment` reads a diffusion network, `NaiveFlow` a network that predicts the flow itself. Objectives, samplers and
    the scheduler take either. A flow is a plain object and not a module, because a cast of the network must never cast
    the table of flow times.

    Shapes: latents, noise, x_t, sample and model_output are [B, ...]; t is [B] or [], float32 (or float64) in [0, 1].

    Args:
        prediction_type: what the network predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".
        num_train_timesteps: number T of timesteps that the network was trained with.
        t_min: lowest flow time that has a timestep of its own; below it the network is fed the timestep of t_min.
        t_max: highest flow time that has a timestep of its own.
    """

    def __init__(self, prediction_type: str, num_train_timesteps: int, t_min: float, t_max: float) -> None:
        self.prediction_type = prediction_type
        self.num_train_timesteps = num_train_timesteps
        self.t_min = t_min
        self.t_max = t_max

    def to(self, device: torch.device | str) -> Self:
        """Return this flow with its table, if it has one, on `device`."""
        return self

    def rising_flow_times(self, dtype: torch.dtype) -> Tensor | None:
        """Return the table of flow times in `dtype`, [T] ascending, or None for a flow without a table."""
        return None

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return the timestep that the network is fed at flow time t, in the shape of t."""

    @abstractmethod
    def flow_time(self, timestep: Tensor) -> Tensor:
        """Return the flow time of a timestep: the inverse of `timestep`."""

    @abstractmethod
    def state_scale(self, t: Tensor) -> Tensor:
        """Return n(t) of sample = x_t / n: the ratio of the flow state to the state that the network takes."""

    @abstractmethod
    def latents_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a, b of x̂0 = a * sample + b * model_output."""

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return P, Q of velocity = P * sample + Q * model_output."""
        return formulas.velocity_coefficients(at_least_float32(t), self.prediction_type, self.t_min, self.t_max)

    def euler_coefficients(self, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, B of the Euler step from t to t_next, on the network's state: A * sample + B * model_output."""
        n, n_next = self.state_scale(t), self.state_scale(t_next)
        return formulas.euler_coefficients(t_next - t, n, n_next, *self.velocity_coefficients(t))

    def interpolate(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the flow state x_t = t * latents + (1 - t) * noise."""
        return formulas.interpolate(latents, noise, t)

    def to_sample(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x_t / n, the state that the network takes, in the type of x_t."""
        return (at_least_float32(x_t) / over_latents(self.state_scale(t), x_t)).to(x_t.dtype)

    def to_flow(self, sample: Tensor, t: Tensor) -> Tensor:
        """Return the flow state n * sample, in the type of `sample`: the inverse of `to_sample`."""
        return (at_least_float32(sample) * over_latents(self.state_scale(t), sample)).to(sample.dtype)

    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return the flow velocity, latents - noise, that the network's output implies.

        Args:
            model_output: output of the network, [B, ...].
            sample: state that the network was given, same shape.
            t: flow time, [B] or [] float32 in [0, 1].
        """
        p, q = self.velocity_coefficients(t)
        return combine(p, sample, q, model_output)

    def predicted_latents(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return x̂0, the latents that the network's output implies."""
        a, b = self.latents_coefficients(t)
        return combine(a, sample, b, model_output)

    def model_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the network output whose velocity is exactly latents - noise."""
        t = at_least_float32(t)
        e, f = formulas.target_coefficients(t, *self.velocity_coefficients(t), self.prediction_type)
        return combine(e, latents, f, noise)

    def times(self, steps: int, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor:
        """Return the flow times 0 … 1 between which a sampler steps, [steps + 1] float32.

        Args:
            steps: number of steps, at least 1.
            spacing: "uniform" in flow time before the shift; no time between the first and the last is below t_min.
            shift: positive factor on the sampler's sigma (1 - t) / t at every time; 1 leaves the times as they are.

        Raises:
            ValueError: `steps` is below 1, `shift` is not positive, or this flow does not have the spacing.
        """
        if spacing != "uniform":
            raise ValueError(f'spacing must be "uniform" for {self.prediction_type}, got {spacing!r}')
        return formulas.shifted_uniform_times(steps, self.t_min, shift).float()

    @abstractmethod
    def sigmas(self, steps: int, shift: float = 1.0) -> list[float]:
        """Return the sigmas of the uniform times for a stock scheduler of diffusers, [steps + 1], ending in 0.0.

        Args:
            steps: number of steps, at least 1.
            shift: positive factor on (1 - t) / t at every time; 1 leaves the times as they are.

        Raises:
            ValueError: `steps` is below 1, or `shift` is not positive.
        """
