"""`NoiseSchedule`: the base model's noise table, whose flow times alignment interpolates.

    alpha_i = sqrt(alphas_cumprod[i]),  sigma_i = sqrt(1 - alphas_cumprod[i]),  r_i = alpha_i / (alpha_i + sigma_i)

i = 0 … T-1 is the base model's own training timestep. The flow time r falls strictly from the data end (r_0 < 1) to the
noise end (r_{T-1} >= 0). Diff2Flow, arXiv 2506.02221, section 3.2 (timestep rescaling).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.flow.scheduler_config import check_zero_snr

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")

# What EulerDiscreteScheduler stores for a terminal alphas_cumprod of exactly zero, so that its own sigmas stay finite.
_EULER_ZERO_TERMINAL_SNR = 2.0**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving noise schedule, and what the network that was trained on it predicts.

    Args:
        alphas_cumprod: products of 1 - beta, [T] floating point, strictly decreasing in (0, 1); the last entry may be
            exactly 0 (zero terminal SNR). It is kept in float64 on the CPU.
        prediction_type: "epsilon", "v_prediction" or "sample", as in diffusers.

    Raises:
        ModelError: `alphas_cumprod` does not decrease as described, the prediction type is unknown or is
            "flow_prediction", or ε is predicted at zero terminal SNR.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        """Refuse a schedule that the formulas cannot serve."""
        table = self.alphas_cumprod.detach().to("cpu", torch.float64)
        object.__setattr__(self, "alphas_cumprod", table)
        if self.prediction_type == "flow_prediction":
            raise ModelError(
                "prediction_type is flow_prediction: the network predicts the flow itself and needs no alignment;"
                " sample it with d2f sample or Diff2FlowScheduler"
            )
        if self.prediction_type not in PREDICTION_TYPES[:3]:
            raise ModelError(f"prediction_type must be one of {PREDICTION_TYPES[:3]}, got {self.prediction_type!r}")
        if table.ndim != 1 or len(table) < 2:
            raise ModelError(f"alphas_cumprod must have shape [T] with T >= 2, got {tuple(table.shape)}")
        in_range = bool(((table[:-1] > 0) & (table[:-1] < 1)).all()) and 0 <= table[-1].item() < 1
        # Flow times must differ in float32 too: training could not distinguish two that coincide there.
        if not in_range or not bool((self.flow_times().float().diff() < 0).all()):
            raise ModelError("alphas_cumprod must decrease strictly within (0, 1), ending at 0 or above")
        check_zero_snr(self.prediction_type, self.zero_terminal_snr)

    @property
    def zero_terminal_snr(self) -> bool:
        """Return whether the last timestep is pure noise."""
        return self.alphas_cumprod[-1].item() == 0

    def flow_times(self) -> Tensor:
        """Return r_i, the flow time of each timestep: [T] float64, strictly decreasing."""
        alpha, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return alpha / (alpha + sigma)

    @classmethod
    def from_scheduler(cls, scheduler: "SchedulerMixin") -> "NoiseSchedule":
        """Return the noise schedule of a diffusers scheduler.

        Args:
            scheduler: diffusion scheduler, which has `alphas_cumprod` and a `prediction_type` in its configuration.

        Raises:
            ModelError: the scheduler has no `alphas_cumprod` or no `prediction_type`, or `NoiseSchedule` refuses them.
        """
        config: Mapping[str, Any] = getattr(scheduler, "config", {})
        name = type(scheduler).__name__
        if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            raise ModelError(
                f"{name} has no alphas_cumprod: pass the diffusion scheduler that the base model was trained with"
            )
        if config.get("prediction_type") is None:
            raise ModelError(
                f"the configuration of {name} has no prediction_type: add it, as in the base model's scheduler"
            )
        table = scheduler.alphas_cumprod.detach().to("cpu", torch.float64).clone()
        if config.get("rescale_betas_zero_snr") and table[-1] <= _EULER_ZERO_TERMINAL_SNR:
            table[-1] = 0
        return cls(table, config["prediction_type"])
