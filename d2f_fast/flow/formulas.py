"""The formulas of Diff2Flow in plain torch, and their only copy; `kernels/align.py` and `velocity_loss.py` fuse them.

    x_t      = t * latents + (1 - t) * noise                  flow state; t = 0 noise, t = 1 data
    sample   = x_t / n = alpha * latents + sigma * noise      diffusion state; n = sqrt(t² + (1 - t)²)
    alpha, sigma = t / n, (1 - t) / n
    velocity = latents - noise = P(t) * sample + Q(t) * model_output      for ε-, v- and x0-prediction alike

Diff2Flow, arXiv 2506.02221, section 3.2: timestep rescaling, interpolant alignment, velocity from the prediction.
Outside the table's flow times [t_min, t_max] the network is asked at the nearest end, its x̂0 and ε̂ are read there,
and the velocity is the one that leads the actual state to them: x̂0 - ε̂ inside, (x̂0 - x_t) / (1 - t) below,
(x_t - ε̂) / t above.

Arithmetic is float32, or float64 for float64 times, whatever the type of the latents; it is rounded once, at the end.
"""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in the type of the arithmetic: float64 stays, every other type becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def over_latents(coefficient: Tensor, latents: Tensor) -> Tensor:
    """Return a coefficient, [B] or scalar, in a shape that broadcasts over latents [B, ...].

    Raises:
        ValueError: the coefficient is neither a scalar nor one number for each sample.
    """
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.shape != latents.shape[:1]:
        raise ValueError(f"t must have shape [{latents.shape[0]}] or [], got {list(coefficient.shape)}")
    return coefficient.reshape(-1, *(1,) * (latents.ndim - 1))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return a * x + b * y, rounded once at the end, in the wider type of x and y."""
    total = over_latents(a, x) * at_least_float32(x) + over_latents(b, y) * at_least_float32(y)
    return total.to(torch.promote_types(x.dtype, y.dtype))


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the flow state t * latents + (1 - t) * noise, in the wider type of latents and noise.

    Args:
        latents: clean latents, [B, ...].
        noise: Gaussian noise, same shape.
        t: flow time, [B] or [] float32 in [0, 1].
    """
    t = at_least_float32(t)
    return combine(t, latents, 1 - t, noise)


def noised_source(source: Tensor, noise: Tensor, source_noise: float) -> Tensor:
    """Return the start of a flow from a source: (1 - source_noise) * source + source_noise * noise.

    It is the point of the flow from noise to the source at flow time 1 - source_noise.

    Args:
        source: latents of the source image, [B, ...].
        noise: Gaussian noise, same shape.
        source_noise: share of noise, in [0, 1]; 0 gives the source and 1 the noise, bit for bit.
    """
    return interpolate(source, noise, torch.tensor(1 - source_noise, dtype=torch.float64))


def state_scale(t: Tensor) -> Tensor:
    """Return n = sqrt(t² + (1 - t)²), the ratio of the flow state to the diffusion state."""
    return (t.square() + (1 - t).square()).sqrt()


def interpolate_timestep(t: Tensor, rising_flow_times: Tensor, t_min: float) -> Tensor:
    """Return the fractional diffusion time of flow times: linear between the table's nodes, clamped to [0, T-1].

    Args:
        t: flow times of any shape, in the table's type.
        rising_flow_times: table of flow times, [T] ascending; entry k belongs to timestep T - 1 - k.
        t_min: flow time below which the timestep no longer changes.
    """
    t, last = t.clamp(min=t_min), len(rising_flow_times) - 1
    upper = torch.searchsorted(rising_flow_times, t.contiguous(), right=True).clamp(1, last)
    below, above = rising_flow_times[upper - 1], rising_flow_times[upper]
    return (last + 1 - upper - (t - below) / (above - below)).clamp(0, last)


def naive_timestep(t: Tensor, num_train_timesteps: int) -> Tensor:
    """Return T * (1 - t), the timestep of networks that predict the flow itself."""
    return num_train_timesteps * (1 - t)


def readout_coefficients(t: Tensor, t_min: float, t_max: float) -> tuple[Tensor, Tensor]:
    """Return alpha, sigma at which the output is read: those of t clipped to [t_min, t_max]; alpha² + sigma² = 1."""
    # 1 - t is clipped by itself: 1 - float32(t_max) would lose the digits of a small sigma.
    to_data, from_data = t.clamp(t_min, t_max), (1 - t).clamp(1 - t_max, 1 - t_min)
    n = (to_data.square() + from_data.square()).sqrt()
    return to_data / n, from_data / n


def latents_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return a, b of x̂0 = a * sample + b * model_output, for a diffusion prediction."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def noise_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return c, d of ε̂ = c * sample + d * model_output, for a diffusion prediction."""
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def velocity_coefficients(t: Tensor, prediction_type: str, t_min: float, t_max: float) -> tuple[Tensor, Tensor]:
    """Return P, Q of velocity = P * sample + Q * model_output, at any t in [0, 1]; 0, -1 for "flow_prediction"."""
    if prediction_type == "flow_prediction":
        one = torch.ones_like(t)
        return torch.zeros_like(one), -one
    n = state_scale(t)
    alpha, sigma = readout_coefficients(t, t_min, t_max)
    (a, b), (c, d) = (read(prediction_type, alpha, sigma) for read in (latents_coefficients, noise_coefficients))
    below, above = t < t_min, t > t_max
    # All branches are computed everywhere, so each denominator is clamped into its own zone, where it is not zero.
    to_data = 1 - t.clamp(max=t_max)
    from_noise = t.clamp(min=t_max)
    p = torch.where(below, (a - n) / to_data, torch.where(above, (n - c) / from_noise, a - c))
    q = torch.where(below, b / to_data, torch.where(above, -d / from_noise, b - d))
    return p, q


def target_coefficients(t: Tensor, p: Tensor, q: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return e, f of model_target = e * latents + f * noise, the output whose velocity is exactly latents - noise."""
    if prediction_type == "flow_prediction":
        return q, -q
    n = state_scale(t)
    return (1 - p * t / n) / q, -(1 + p * (1 - t) / n) / q


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Return the flow times whose sigma = (1 - t) / t is `shift` times as large; 0 and 1 stay."""
    return t / (t + shift * (1 - t))


def shifted_uniform_times(steps: int, t_min: float, shift: float) -> Tensor:
    """Return flow times 0 … 1, [steps + 1] float64: uniform before the shift, and none but the first below `t_min`.

    Raises:
        ValueError: `steps` is below 1, or `shift` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    lowest = torch.tensor(t_min, dtype=torch.float64)
    first = max(1 / steps, shift_times(lowest, 1 / shift).item())
    interior = torch.linspace(first if steps > 1 else 1, 1, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), shift_times(interior, shift)])


def euler_coefficients(step: Tensor, n: Tensor, n_next: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return A, B of one Euler step in flow time on the network's own state: sample' = A * sample + B * model_output.

    A = (n + (t' - t) P) / n', B = (t' - t) Q / n', primes at the next time t'; `step` is t' - t. The step equals a DDIM
    (η = 0) step between the same nodes.
    """
    return (n + step * p) / n_next, step * q / n_next
