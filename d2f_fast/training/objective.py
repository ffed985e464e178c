"""The three objectives: what the network is given, and what its output should have been.

`diff2flow` the aligned flow-matching loss; `diffusion` the base model's own loss, which is the aligned one at the
table's nodes with native weighting; `fm` naive flow matching, the same network fed the unaligned state. Diff2Flow,
arXiv 2506.02221, section 3.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from d2f_fast.config import LossWeighting, ObjectiveName, TimestepSampling
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.flow.time_sampling import sample_times
from d2f_fast.ops import align, aligned_loss


@dataclass(frozen=True)
class Objective:
    """One objective of a network.

    Args:
        name: which.
        alignment: the base model's.
        weighting: of "diff2flow" and "fm"; the diffusion loss is always the network's own.
        snr_gamma: of the weighting "min_snr".
        timestep_sampling, logit_mean, logit_std, flow_shift: density of the flow time; "diffusion" draws its integer
            timesteps uniformly.

    Raises:
        ValueError: an unknown name.
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
        """Refuse a name that would be read as "diff2flow"."""
        if self.name not in get_args(ObjectiveName):
            raise ValueError(f"objective must be one of {get_args(ObjectiveName)}, got {self.name!r}")

    @property
    def flow(self) -> Flow:
        """How a network trained on this objective is read."""
        return NaiveFlow(self.alignment.num_train_timesteps) if self.name == "fm" else self.alignment

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw flow times, [batch] float32."""
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
        """State and timestep that the network is given; see `align`."""
        return align(latents, noise, t, self.flow)

    def loss(self, model_output: Tensor, latents: Tensor, noise: Tensor, t: Tensor, **options: Any) -> Tensor:
        """Loss of the network's output; `mask` and `reduction` as in `aligned_loss`."""
        weighting: LossWeighting = "native" if self.name == "diffusion" else self.weighting
        return aligned_loss(model_output, latents, noise, t, self.flow, weighting, snr_gamma=self.snr_gamma, **options)
