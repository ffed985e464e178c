"""The three objectives: the inputs of the network, and the loss of its output.

`diff2flow` is the aligned flow-matching loss. `diffusion` is the base model's own loss, which equals the aligned one at
the table's nodes with native weighting. `fm` is naive flow matching: the same network, fed the unaligned state.
Diff2Flow, arXiv 2506.02221, section 3.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from d2f_fast.config import LossWeighting, ObjectiveName, TimestepSampling
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.flow.time_sampling import sample_times
from d2f_fast.ops import Reduction, align, aligned_loss


@dataclass(frozen=True)
class Objective:
    """One objective of a network.

    Args:
        name: "diff2flow", "fm" or "diffusion".
        alignment: alignment of the base model, on the network's device.
        weighting: weighting of the velocity error for "diff2flow" and "fm"; "diffusion" always uses the network's own.
        snr_gamma: positive bound on the signal-to-noise ratio in the weighting "min_snr".
        timestep_sampling: density of 1 - t; "diffusion" samples its integer timesteps uniformly instead.
        logit_mean: mean of the normal variable of "logit_normal".
        logit_std: its standard deviation, positive.
        flow_shift: positive factor on the sigmas (1 - t) / t of the sampled times; 1 leaves them as they are.

    Raises:
        ValueError: the name is unknown.
    """

    name: ObjectiveName
    alignment: Alignment
    weighting: LossWeighting = "flow"
    snr_gamma: float = 5.0
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    flow_shift: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an unknown name, which would be treated as "diff2flow"."""
        if self.name not in get_args(ObjectiveName):
            raise ValueError(f"objective must be one of {get_args(ObjectiveName)}, got {self.name!r}")

    @property
    def flow(self) -> Flow:
        """Flow that maps time and velocity for a network trained on this objective."""
        return NaiveFlow(self.alignment.num_train_timesteps) if self.name == "fm" else self.alignment

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Sample flow times.

        Args:
            batch: number of times.
            generator: source of random numbers on `device`; None for torch's global generator.
            device: device of the times.

        Returns:
            [batch] float32 in [0, 1].
        """
        if self.name == "diffusion":
            steps = torch.randint(self.alignment.num_train_timesteps, (batch,), generator=generator, device=device)
            return self.alignment.flow_time(steps.to(torch.float32))
        return sample_times(
            batch,
            self.timestep_sampling,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            shift=self.flow_shift,
            generator=generator,
            device=device,
        )

    def inputs(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state [B, C, H, W] and the timestep [B] that the network is fed; see `align`."""
        return align(latents, noise, t, self.flow)

    def loss(
        self,
        model_output: Tensor,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the loss of the network's output; arguments and result are those of `aligned_loss`."""
        weighting: LossWeighting = "native" if self.name == "diffusion" else self.weighting
        return aligned_loss(
            model_output, latents, noise, t, self.flow, weighting, mask, reduction=reduction, snr_gamma=self.snr_gamma
        )
