"""The three objectives: the inputs of the network, and the loss of its output.

`diff2flow` is the aligned flow-matching loss. `diffusion` is the base model's own loss, which equals the aligned one at
the table's nodes with native weighting. `fm` is naive flow matching: the same network, fed the unaligned state; it is
the only objective of a base model that predicts the flow itself. Diff2Flow, arXiv 2506.02221, section 3.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from d2f_fast.config import (
    DEFAULT_SNR_GAMMA,
    FlowForm,
    LossWeighting,
    ObjectiveName,
    TimestepSampling,
    TrainingConfig,
)
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import readout_coefficients
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.flow.time_sampling import sample_times
from d2f_fast.ops import Reduction, align, aligned_loss
from d2f_fast.training.method import own_weighting


@dataclass(frozen=True)
class Objective:
    """One objective of a network.

    Args:
        name: "diff2flow", "fm" or "diffusion".
        base_flow: flow of the base model, on the network's device: an `Alignment`, or a `NaiveFlow` for "fm" only.
        weighting: weighting of the velocity error for "diff2flow" and "fm". "diffusion" has the network's own, which
            "min_snr" multiplies by the Min-SNR weight of diffusers' training scripts.
        snr_gamma: positive bound on the signal-to-noise ratio in the weighting "min_snr".
        timestep_sampling: density of 1 - t; "diffusion" samples its integer timesteps uniformly instead.
        logit_mean: mean of the normal variable of "logit_normal".
        logit_std: its standard deviation, positive.
        flow_shift: positive factor on the sigmas (1 - t) / t of the sampled times; 1 leaves them as they are.
        fm_form: form of "fm" on a diffusion model; the other objectives, and a base model that predicts the flow and
            has a form of its own, ignore it.
        distill: whether t = 0 is the only time, at which the velocity is the jump from the start of the flow, which is
            noise or zeros, to the latents.

    Raises:
        ValueError: the name is unknown, or the base model predicts the flow and the name is not "fm".
    """

    name: ObjectiveName
    base_flow: Flow
    weighting: LossWeighting = "flow"
    snr_gamma: float = DEFAULT_SNR_GAMMA
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    flow_shift: float = 1.0
    fm_form: FlowForm = "diffusers"
    distill: bool = False

    def __post_init__(self) -> None:
        """Refuse a name that would be treated as "diff2flow"."""
        if self.name not in get_args(ObjectiveName):
            raise ValueError(f"objective must be one of {get_args(ObjectiveName)}, got {self.name!r}")
        if isinstance(self.base_flow, NaiveFlow) and self.name != "fm":
            raise ValueError(f'objective must be "fm" where the base model predicts the flow, got {self.name!r}')

    @property
    def flow(self) -> Flow:
        """Flow that maps time and velocity for a network trained on this objective."""
        if self.name != "fm" or isinstance(self.base_flow, NaiveFlow):
            return self.base_flow
        return NaiveFlow(self.base_flow.num_train_timesteps, self.fm_form)

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
        if self.distill:
            return torch.zeros(batch, device=device)
        if self.name == "diffusion":
            steps = torch.randint(self.base_flow.num_train_timesteps, (batch,), generator=generator, device=device)
            return self.base_flow.flow_time(steps.to(torch.float32))
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
        if self.name != "diffusion":
            return aligned_loss(
                *(model_output, latents, noise, t, self.flow, self.weighting, mask),
                reduction=reduction,
                snr_gamma=self.snr_gamma,
            )
        if self.weighting != "min_snr":
            return aligned_loss(model_output, latents, noise, t, self.flow, "native", mask, reduction)
        each = aligned_loss(model_output, latents, noise, t, self.flow, "native", mask, "none")
        each = each * min_snr_weight(t, self.flow, self.snr_gamma)
        return each.mean() if reduction == "mean" else each


def min_snr_weight(t: Tensor, flow: Flow, gamma: float) -> Tensor:
    """Return the Min-SNR weight of the network's own loss, as diffusers' training scripts have it.

        min(SNR, gamma) / SNR for ε-, / (SNR + 1) for v-, and / 1 for x0-prediction

    All three weight the error of x̂0 alike. Min-SNR, arXiv 2303.09556, section 3.4.

    Args:
        t: flow time, [B] float32 or float64.
        flow: flow of a diffusion model.
        gamma: positive bound on the signal-to-noise ratio.

    Returns:
        The weight of each sample, [B].
    """
    alpha, sigma = readout_coefficients(t, flow.t_min, flow.t_max)
    signal, noise = alpha.square(), sigma.square()
    if flow.prediction_type == "epsilon":  # without a division by the SNR, which is 0 at zero terminal SNR
        return gamma * noise / torch.maximum(signal, gamma * noise)
    bounded = torch.minimum(signal, gamma * noise)
    return bounded if flow.prediction_type == "v_prediction" else bounded / noise


def make_objective(config: TrainingConfig, base_flow: Flow) -> Objective:
    """Return the objective of a run.

    Args:
        config: options from `settle_method`.
        base_flow: flow of the base model, on the network's device.
    """
    return Objective(
        config.objective or "diff2flow",
        base_flow,
        own_weighting(config.objective or "diff2flow", config),
        config.snr_gamma or DEFAULT_SNR_GAMMA,
        config.timestep_sampling,
        config.logit_mean or 0.0,
        config.logit_std or 1.0,
        config.flow_shift,
        config.fm_form or "diffusers",
        config.distill,
    )


def method_line(config: TrainingConfig, base_flow: Flow) -> str:
    """Return what is trained, and why, in one line.

    Args:
        config: options from `settle_method`.
        base_flow: flow of the base model.
    """
    learns = {
        "diff2flow": "flow matching, aligned with the base model",
        "diffusion": "the loss of the base model",
        "fm": "naive flow matching in the form of diffusers (fed 1000 (1 - t), learns noise - latents)",
    }
    if config.fm_form == "published":
        learns["fm"] = "naive flow matching in the published form (fed t, learns latents - noise)"
    jump = ", at t = 0 alone (one jump to the latents)" if config.distill else ""
    if config.lpips_weight:
        jump += f", with {config.lpips_weight:g} times LPIPS ({config.lpips_net}) of the decoded images"
    line = f"objective {config.objective}: {learns[str(config.objective)]}{jump}; the base model predicts"
    return f"{line} {base_flow.prediction_type}"
