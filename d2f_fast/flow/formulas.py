"""Diff2Flow's formulas in plain torch, their only copy."""

from typing import Protocol

import torch
from torch import Tensor

from d2f_fast.config import Spacing


class Flow(Protocol):
    """What objectives, samplers and the scheduler need to know of a network: `Alignment` or `NaiveFlow`."""

    prediction_type: str
    t_min: float
    t_max: float
    num_train_timesteps: int

    def to(self, device: torch.device | str) -> "Flow": ...
    def rising_flow_times(self, dtype: torch.dtype) -> Tensor | None: ...
    def timestep(self, t: Tensor) -> Tensor: ...
    def flow_time(self, timestep: Tensor) -> Tensor: ...
    def to_sample(self, x_t: Tensor, t: Tensor) -> Tensor: ...
    def to_flow(self, sample: Tensor, t: Tensor) -> Tensor: ...
    def state_scale(self, t: Tensor) -> Tensor: ...
    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def velocity(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor: ...
    def model_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def predicted_latents(self, model_output: Tensor, sample: Tensor, t: Tensor) -> Tensor: ...
    def times(self, steps: int, spacing: Spacing = "uniform", shift: float = 1.0) -> Tensor: ...


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in the type of the arithmetic: float64 stays, everything else is float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def over_latents(coefficient: Tensor, latents: Tensor) -> Tensor:
    """View a coefficient, [B] or scalar, so that it multiplies latents [B, ...]."""
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.shape != latents.shape[:1]:
        raise ValueError(f"t must have shape [{latents.shape[0]}] or [], got {list(coefficient.shape)}")
    return coefficient.reshape(-1, *(1,) * (latents.ndim - 1))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a * x + b * y with one rounding at the end, in the wider type of x and y."""
    total = over_latents(a, x) * at_least_float32(x) + over_latents(b, y) * at_least_float32(y)
    return total.to(torch.promote_types(x.dtype, y.dtype))


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Flow state t * latents + (1 - t) * noise, in the wider type of the two.

    Args:
        latents, noise: [B, ...].
        t: [B] or [] float32 in [0, 1].
    """
    t = at_least_float32(t)
    return combine(t, latents, 1 - t, noise)


def state_scale(t: Tensor) -> Tensor:
    """n = sqrt(t² + (1 - t)²), the norm that separates the flow state from the diffusion state."""
    return (t.square() + (1 - t).square()).sqrt()


def interpolate_timestep(t: Tensor, rising_flow_times: Tensor, t_min: float) -> Tensor:
    """Fractional diffusion time of flow times, linear between the table's nodes, clamped to [0, T-1].

    Args:
        t: any shape, of the table's type.
        rising_flow_times: [T]; entry k belongs to timestep T - 1 - k.
    """
    t, last = t.clamp(min=t_min), len(rising_flow_times) - 1
    upper = torch.searchsorted(rising_flow_times, t.contiguous(), right=True).clamp(1, last)
    below, above = rising_flow_times[upper - 1], rising_flow_times[upper]
    return (last + 1 - upper - (t - below) / (above - below)).clamp(0, last)


def naive_timestep(t: Tensor, num_train_timesteps: int) -> Tensor:
    """T * (1 - t), what networks that predict the flow are fed."""
    return num_train_timesteps * (1 - t)


def readout_coefficients(t: Tensor, t_min: float, t_max: float) -> tuple[Tensor, Tensor]:
    """alpha, sigma at which the output is read: those of t clipped to [t_min, t_max]; alpha² + sigma² = 1."""
    # 1 - t is clipped on its own: 1 - float32(t_max) would lose the digits of a small sigma.
    to_data, from_data = t.clamp(t_min, t_max), (1 - t).clamp(1 - t_max, 1 - t_min)
    n = (to_data.square() + from_data.square()).sqrt()
    return to_data / n, from_data / n


def latents_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """a, b of x̂0 = a * sample + b * model_output."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def noise_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """c, d of ε̂ = c * sample + d * model_output."""
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def velocity_coefficients(t: Tensor, prediction_type: str, t_min: float, t_max: float) -> tuple[Tensor, Tensor]:
    """P, Q of velocity = P * sample + Q * model_output, at any t in [0, 1]; "flow_prediction" is 0, -1."""
    if prediction_type == "flow_prediction":
        one = torch.ones_like(t)
        return torch.zeros_like(one), -one
    n = state_scale(t)
    alpha, sigma = readout_coefficients(t, t_min, t_max)
    (a, b), (c, d) = (read(prediction_type, alpha, sigma) for read in (latents_coefficients, noise_coefficients))
    below, above = t < t_min, t > t_max
    # The denominators are clamped into their own zone, where they are never zero: both branches are always computed.
    to_data = 1 - t.clamp(max=t_max)
    from_noise = t.clamp(min=t_max)
    p = torch.where(below, (a - n) / to_data, torch.where(above, (n - c) / from_noise, a - c))
    q = torch.where(below, b / to_data, torch.where(above, -d / from_noise, b - d))
    return p, q


def target_coefficients(t: Tensor, p: Tensor, q: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """e, f of model_target = e * latents + f * noise, the output whose velocity is exactly latents - noise."""
    if prediction_type == "flow_prediction":
        return q, -q
    n = state_scale(t)
    return (1 - p * t / n) / q, -(1 + p * (1 - t) / n) / q


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Flow times whose sigma = (1 - t) / t is `shift` times as large; 0 and 1 stay."""
    return t / (t + shift * (1 - t))


def shifted_uniform_times(steps: int, t_min: float, shift: float) -> Tensor:
    """Nodes 0 … 1, [steps + 1] float64, uniform before the shift; the interior keeps at or above `t_min`."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    lowest = torch.tensor(t_min, dtype=torch.float64)
    first = max(1 / steps, shift_times(lowest, 1 / shift).item())
    interior = torch.linspace(first if steps > 1 else 1, 1, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), shift_times(interior, shift)])


def euler_coefficients(flow: Flow, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """A, B of one Euler step in flow time on the network's own state: sample' = A * sample + B * model_output.

    A = (n + (t' - t) P) / n', B = (t' - t) Q / n', primes at t'. Equal to a DDIM (η = 0) step between the same nodes.
    """
    p, q = flow.velocity_coefficients(t)
    step, n_next = t_next - t, flow.state_scale(t_next)
    return (flow.state_scale(t) + step * p) / n_next, step * q / n_next
