"""Find the flow times between which a diffusion model's own DDIM sampler steps.

Between the same times, Euler's method along the flow equals DDIM with η = 0 for any network.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2f_fast.flow.alignment import Alignment

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


def times_of_ddim(scheduler: "DDIMScheduler", alignment: Alignment, steps: int) -> Tensor:
    """Return the flow times of DDIM's steps, [steps + 1] float32 rising, from the noisiest one to the last state.

    Args:
        scheduler: DDIM scheduler of the model; its number of steps is changed.
        alignment: flow of the same model.
        steps: number of steps.
    """
    scheduler.set_timesteps(steps)
    times = alignment.flow_time(scheduler.timesteps.float())
    # The last step ends at this noise level, in place of that of a timestep below 0.
    alpha = scheduler.final_alpha_cumprod.float().sqrt()
    sigma = (1 - scheduler.final_alpha_cumprod.float()).clamp(min=0).sqrt()
    return torch.cat([times, (alpha / (alpha + sigma)).reshape(1)])
