"""`Alignment`: the flow of a pretrained diffusion model, by Diff2Flow; `formulas.py` holds the equations."""

import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from d2f_fast.config import Spacing
from d2f_fast.flow import formulas
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import at_least_float32
from d2f_fast.flow.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# EulerDiscreteScheduler's own sigma_max for zero terminal SNR: far enough from the data that the start is pure noise.
SIGMA_OF_PURE_NOISE = 4096.0

# Largest 1 / alpha at which an ε-prediction is read: SD's table ends at 14.6, DDPM's at 157, a cosine one at 20,000.
_LARGEST_READOUT = 200.0


class Alignment(Flow):
    """Flow of a pretrained diffusion model: its timesteps, states and predictions, aligned with flow matching.

    Args:
        schedule: the base model's noise schedule and prediction type.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        rising = schedule.flow_times().flip(0)
        t_min = rising[0].item()
        if schedule.prediction_type == "epsilon":
            # Where alpha is smaller, as on a cosine table, x̂0 = (sample - sigma ε̂) / alpha is nothing but error.
            t_min = max(t_min, 1 / (1 + math.sqrt(_LARGEST_READOUT**2 - 1)))
        super().__init__(schedule.prediction_type, len(rising), t_min, t_max=rising[-1].item())
        self.schedule = schedule
        self._rising_flow_times = {torch.float64: rising, torch.float32: rising.float()}

    @classmethod
    def from_scheduler(cls, scheduler: "SchedulerMixin") -> Self:
        """Return the alignment of the model that a diffusers scheduler belongs to.

        Args:
            scheduler: diffusion scheduler of diffusers; its configuration gives the noise table, the prediction type
                and zero terminal SNR.

        Raises:
            ModelError: the scheduler has no `alphas_cumprod`, its `prediction_type` is unknown, or it predicts ε with
                zero terminal SNR.
        """
        return cls(NoiseSchedule.from_scheduler(scheduler))

    def to(self, device: torch.device | str) -> Self:
        """Return the same alignment with its table on `device`."""
        moved = type(self)(self.schedule)
        moved._rising_flow_times = {dtype: table.to(device) for dtype, table in self._rising_flow_times.items()}
        return moved

    def rising_flow_times(self, dtype: torch.dtype) -> Tensor:
        """Return the table, [T] ascending as torch.searchsorted needs it: entry k belongs to timestep T - 1 - k."""
        return self._rising_flow_times[dtype]

    def timestep(self, t: Tensor) -> Tensor:
        """Return the fractional timestep that the network is fed, in [0, T-1], linear between the table's flow times.

        Args:
            t: flow time of any shape, float32 (or float64) in [0, 1].
        """
        t = at_least_float32(t)
        return formulas.interpolate_timestep(t, self.rising_flow_times(t.dtype), self.t_min)

    def flow_time(self, timestep: Tensor) -> Tensor:
        """Return the flow time of a fractional timestep in [0, T-1]: the inverse of `timestep` inside the table."""
        timestep = at_least_float32(timestep)
        rising = self.rising_flow_times(timestep.dtype)
        position = (self.num_train_timesteps - 1 - timestep).clamp(0, self.num_train_timesteps - 1)
        lower = position.long().clamp(max=self.num_train_timesteps - 2)
        return torch.lerp(rising[lower], rising[lower + 1], position - lower)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha, sigma at which the network's output is read: those of t clipped to [t_min, t_max]."""
        return formulas.readout_coefficients(at_least_float32(t), self.t_min, self.t_max)

    def state_scale(self, t: Tensor) -> Tensor:
        """Return n = sqrt(t² + (1 - t)²), the ratio of the flow state to the diffusion state."""
        return formulas.state_scale(at_least_float32(t))

    def latents_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a, b of x̂0 = a * sample + b * model_output."""
        return formulas.latents_coefficients(self.prediction_type, *self.coefficients(t))

    def times(self, steps: int, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor:
        """Return the flow times 0 … 1 between which a sampler steps, [steps + 1] float32.

        Args:
            steps: number of steps, at least 1, and at most T with trailing spacing.
            spacing: "uniform" in flow time, or "trailing", the flow times of DDIM's trailing timesteps, with 0 in place
                of t_min as the start. Later times that would lie below t_min are spread above it.
            shift: positive factor on the sampler's sigma (1 - t) / t at every time; 1 leaves the times as they are.

        Raises:
            ValueError: `steps` is out of range, `shift` is not positive, or the spacing is unknown.
        """
        if spacing == "uniform":
            return super().times(steps, shift=shift)
        if spacing != "trailing":
            raise ValueError(f'spacing must be "uniform" or "trailing", got {spacing!r}')
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"steps must be 1 to {self.num_train_timesteps} with trailing spacing, got {steps}")
        # DDIMScheduler, timestep_spacing="trailing": round(T - k T / steps) - 1.
        trailing = (self.num_train_timesteps * (1 - torch.arange(1, steps, dtype=torch.float64) / steps)).round() - 1
        interior = formulas.shift_times(self.schedule.flow_times()[trailing.long()], shift)
        below = int((interior < self.t_min).sum())
        end = float(interior[below]) if below < len(interior) else 1.0
        interior[:below] = torch.linspace(self.t_min, end, below + 1, dtype=torch.float64)[:-1]
        return torch.cat([torch.zeros(1), interior.float(), torch.ones(1)])

    def sigmas(self, steps: int, shift: float = 1.0) -> list[float]:
        """Return the sigmas (1 - t) / t of the uniform times, for a stock scheduler's `set_timesteps(sigmas=...)`.

        The first one makes a stock Euler step start at t = 0: sigma_max + sigma_1 for ε-prediction, 4096 otherwise.
        The last one is 0.0.

        Args:
            steps: number of steps, at least 1.
            shift: positive factor on each sigma; 1 leaves them as they are.

        Raises:
            ValueError: `steps` is below 1, or `shift` is not positive.
        """
        times = formulas.shifted_uniform_times(steps, self.t_min, shift)[1:]
        later = ((1 - times) / times).tolist()
        first = (1 - self.t_min) / self.t_min + later[0] if self.prediction_type == "epsilon" else SIGMA_OF_PURE_NOISE
        return [first, *later]
