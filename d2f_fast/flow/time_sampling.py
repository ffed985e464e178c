"""Densities from which training samples the flow time.

Each is a density of s = 1 - t, diffusers' sigma (0 data, 1 noise), so that `logit_mean` has the sign that it has in the
papers; a shift k multiplies the sampling sigma s / (1 - s) by k: s' = k s / (1 + (k - 1) s). SD3, arXiv 2403.03206,
section 3.1 (logit-normal, mode, shift); Lee et al., arXiv 2405.20320, section 4 (u-shaped).
"""

import math
from typing import get_args

import torch
from torch import Tensor

from d2f_fast.config import TimestepSampling
from d2f_fast.flow.formulas import shift_times

MODE_SCALE = 1.29  # SD3's best setting
U_SHAPE = 4.0  # p(s) proportional to cosh(4 (s - 1/2))


def sample_times(
    batch: int,
    sampling: TimestepSampling = "uniform",
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return random flow times t, [batch] float32 in [0, 1].

    Args:
        batch: number of times.
        sampling: density of s = 1 - t before the shift: "uniform", "logit_normal", "mode" or "u_shaped".
        logit_mean: mean of logit(s) for "logit_normal"; the other densities ignore it.
        logit_std: positive standard deviation of logit(s) for "logit_normal"; the other densities ignore it.
        shift: positive factor k on the sampling sigma; above 1 more of the times are near the noise, 1 turns it off.
        generator: source of the random numbers, on `device`; None for torch's global generator.
        device: where the times are sampled.

    Raises:
        ValueError: the density is unknown, or the shift or the deviation is not positive.
    """
    if not shift > 0 or not logit_std > 0:
        raise ValueError(f"shift and logit_std must be positive, got {shift} and {logit_std}")
    if sampling == "logit_normal":
        s = torch.randn(batch, generator=generator, device=device).mul(logit_std).add(logit_mean).sigmoid()
    else:
        u = torch.rand(batch, generator=generator, device=device)
        if sampling == "uniform":
            s = u
        elif sampling == "mode":
            s = 1 - u - MODE_SCALE * ((math.pi / 2 * u).cos().square() - 1 + u)
        elif sampling == "u_shaped":
            # Inverse of the distribution function 1/2 + sinh(a (s - 1/2)) / (2 sinh(a / 2)), a = U_SHAPE.
            s = 0.5 + torch.asinh((2 * u - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE
        else:
            raise ValueError(f"timestep_sampling must be one of {get_args(TimestepSampling)}, got {sampling!r}")
    # Rounding may take the inverse distribution functions an ulp outside [0, 1]; the shift keeps 0 and 1 exactly.
    return shift_times((1 - s).clamp(0, 1), shift)
