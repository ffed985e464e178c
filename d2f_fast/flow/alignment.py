"""Diff2Flow's formulas in plain torch, their only copy; `kernels/align.py` and `velocity_loss.py` fuse them.

    x_t      = t * latents + (1 - t) * noise          flow state; t = 0 noise, t = 1 data; velocity = latents - noise
    sample   = x_t / n = alpha * latents + sigma * noise      diffusion state; n = sqrt(t² + (1 - t)²)
    alpha, sigma = t / n, (1 - t) / n
    velocity = P(t) * sample + Q(t) * model_output    for ε, v and x0 prediction alike

Diff2Flow, arXiv 2506.02221, section 3.2: timestep rescaling, interpolant alignment, velocity from the prediction.
Outside the table's flow times [t_min, t_max] the network is asked at the nearest end, its x̂0 and ε̂ are read there,
and the velocity is the one that leads the actual state to them: x̂0 - ε̂ inside, (x̂0 - x_t) / (1 - t) below,
(x_t - ε̂) / t above.

Arithmetic is float32, or float64 for float64 times, whatever the latents are; one rounding, at the store.
"""

import math
from typing import Any

import torch
from torch import Tensor

from d2f_fast.config import Spacing
from d2f_fast.flow.formulas import (
    at_least_float32,
    combine,
    interpolate,
    interpolate_timestep,
    latents_coefficients,
    over_latents,
    readout_coefficients,
    shift_times,
    shifted_uniform_times,
    state_scale,
    target_coefficients,
    velocity_coefficients,
)
from d2f_fast.flow.noise_schedule import NoiseSchedule

# EulerDiscreteScheduler's own sigma_max for zero terminal SNR: far enough from the data that the start is pure noise.
_SIGMA_OF_PURE_NOISE = 4096.0

# Largest 1 / alpha at which an ε-prediction is read: SD's table ends at 14.6, DDPM's at 157, a cosine one at 20,000.
_LARGEST_READOUT = 200.0


class Alignment:
    """The map between a pretrained diffusion model and flow matching.

    A plain object, not a module: a cast of the network must never cast the table.

    Args:
        schedule: the base model's noise schedule and prediction type.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.prediction_type = schedule.prediction_type
        self.num_train_timesteps = len(schedule.alphas_cumprod)
        rising = schedule.flow_times().flip(0)
        self.t_min = rising[0].item()
        if self.prediction_type == "epsilon":
            # Where alpha is smaller, as on a cosine table, x̂0 = (sample - sigma ε̂) / alpha is error and nothing else.
            self.t_min = max(self.t_min, 1 / (1 + math.sqrt(_LARGEST_READOUT**2 - 1)))
        self.t_max = rising[-1].item()
        self._rising_flow_times = {torch.float64: rising, torch.float32: rising.float()}

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "Alignment":
        """Alignment of the model that a diffusers scheduler belongs to, from the scheduler's own configuration.

        Raises:
            ModelError: no `alphas_cumprod`, an unknown `prediction_type`, or ε-prediction with zero terminal SNR.
        """
        return cls(NoiseSchedule.from_scheduler(scheduler))

    def to(self, device: torch.device | str) -> "Alignment":
        """The same alignment with its table on a device."""
        moved = Alignment(self.schedule)
        moved._rising_flow_times = {dtype: table.to(device) for dtype, table in self._rising_flow_times.items()}
        return moved

    def rising_flow_times(self, dtype: torch.dtype) -> Tensor:
        """The table, [T] ascending as torch.searchsorted wants it: entry k belongs to timestep T - 1 - k."""
        return self._rising_flow_times[dtype]

    def timestep(self, t: Tensor) -> Tensor:
        """Fractional diffusion time that the network is fed: linear in r between the table's nodes, clamped to [0,
        T-1].

        Args:
            t: any shape, float32 (or float64) in [0, 1].
        """
        t = at_least_float32(t)
        return interpolate_timestep(t, self.rising_flow_times(t.dtype), self.t_min)

    def flow_time(self, timestep: Tensor) -> Tensor:
        """Flow time of a fractional diffusion time in [0, T-1]: the inverse of `timestep` inside the table."""
        timestep = at_least_float32(timestep)
        rising = self.rising_flow_times(timestep.dtype)
        position = (self.num_train_timesteps - 1 - timestep).clamp(0, self.num_train_timesteps - 1)
        lower = position.long().clamp(max=self.num_train_timesteps - 2)
        return torch.lerp(rising[lower], rising[lower + 1], position - lower)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma at which the output is read: those of t clipped to [t_min, t_max]; alpha² + sigma² = 1."""
        return readout_coefficients(at_least_float32(t), self.t_min, self.t_max)

    def state_scale(self, t: Tensor) -> Tensor:
        """n = sqrt(t² + (1 - t)²), the norm that separates the flow state from the diffusion state."""
        return state_scale(at_least_float32(t))

    def interpolate(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Flow state t * latents + (1 - t) * noise."""
        return interpolate(latents, noise, t)

    def to_sample(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Diffusion state x_t / n = (alpha + sigma) * x_t: interpolant alignment."""
        return (at_least_float32(x_t) / over_latents(self.state_scale(t), x_t)).to(x_t.dtype)

    def to_flow(self, sample: Tensor, t: Tensor) -> Tensor:
        """Flow state n * sample: the inverse of `to_sample`."""
        return (at_least_float32(sample) * over_latents(self.state_scale(t), sample)).to(sample.dtype)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """P, Q of velocity = P * sample + Q * model_output, at any t in [0, 1]."""
        return velocity_coefficients(at_least_float32(t), self.prediction_type, self.t_min, self.t_max)

    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Flow velocity, latents - noise, that the network's ε, v or x0 output implies.

        Args:
            model_output, sample: [B, ...]; `sample` is the diffusion state that the network was given.
            t: [B] or [] float32 in [0, 1].
        """
        p, q = self.velocity_coefficients(t)
        return combine(p, sample, q, model_output)

    def predicted_latents(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """x̂0, the latents that the network's output implies."""
        a, b = latents_coefficients(self.prediction_type, *self.coefficients(t))
        return combine(a, sample, b, model_output)

    def model_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Network output whose velocity is exactly latents - noise: (velocity - P * sample) / Q."""
        e, f = target_coefficients(at_least_float32(t), *self.velocity_coefficients(t), self.prediction_type)
        return combine(e, latents, f, noise)

    def times(self, steps: int, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor:
        """Flow nodes 0 … 1 of a sampler, [steps + 1] float32.

        Args:
            steps: network evaluations, at least 1.
            spacing: "uniform" in flow time, or "trailing", the flow times of DDIM's trailing timesteps, with 0 in place
                of t_min as the start. No interior node is below t_min: those that would be are spread above it.
            shift: multiplies the sampler's sigma = (1 - t) / t at every node.
        """
        if spacing == "uniform":
            return shifted_uniform_times(steps, self.t_min, shift).float()
        if spacing != "trailing":
            raise ValueError(f'spacing must be "uniform" or "trailing", got {spacing!r}')
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"steps must be 1 to {self.num_train_timesteps} with trailing spacing, got {steps}")
        # DDIMScheduler, timestep_spacing="trailing": round(T - k T / steps) - 1.
        trailing = (self.num_train_timesteps * (1 - torch.arange(1, steps, dtype=torch.float64) / steps)).round() - 1
        interior = shift_times(self.schedule.flow_times()[trailing.long()], shift)
        below = int((interior < self.t_min).sum())
        end = float(interior[below]) if below < len(interior) else 1.0
        interior[:below] = torch.linspace(self.t_min, end, below + 1, dtype=torch.float64)[:-1]
        return torch.cat([torch.zeros(1), interior.float(), torch.ones(1)])

    def sigmas(self, steps: int, shift: float = 1.0) -> list[float]:
        """Sigmas (1 - t) / t of the uniform nodes, for any stock scheduler's `set_timesteps(sigmas=...)`; ends in 0.0.

        The first one makes a stock Euler step start at t = 0: sigma_max + sigma_1 for ε-prediction, 4096 otherwise.

        Args:
            steps: network evaluations, at least 1.
            shift: multiplies each sigma.

        Raises:
            ValueError: fewer than one step, or a shift that is not positive.
        """
        nodes = shifted_uniform_times(steps, self.t_min, shift)[1:]
        later = ((1 - nodes) / nodes).tolist()
        first = (1 - self.t_min) / self.t_min + later[0] if self.prediction_type == "epsilon" else _SIGMA_OF_PURE_NOISE
        return [first, *later]
