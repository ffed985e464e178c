"""Say what a scheduler's configuration states about the flow of its network. Imports no torch."""

from collections.abc import Mapping
from typing import get_args

from d2f_fast.config import FlowForm
from d2f_fast.errors import ModelError

# Schedulers of diffusers that can end at zero terminal SNR; the others ignore `rescale_betas_zero_snr`.
_WITH_ZERO_SNR = {
    *("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "DDPMScheduler"),
    *("DDPMParallelScheduler", "DPMSolverMultistepScheduler", "CogVideoXDPMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
}

# Number of timesteps that Stable Diffusion was trained with, where a configuration does not say it.
NUM_TRAIN_TIMESTEPS = 1000


def predicts_flow(config: Mapping[str, object]) -> bool:
    """Return whether a scheduler's configuration belongs to a network that predicts the flow itself.

    Args:
        config: configuration of a scheduler of diffusers. diffusers' own flow-matching schedulers have no prediction
            type, and are known by their shift and the missing noise table.
    """
    if "prediction_type" in config:
        return config["prediction_type"] == "flow_prediction"
    return "shift" in config and "beta_schedule" not in config


def form_of_config(config: Mapping[str, object]) -> FlowForm | None:
    """Return the form in which a network predicts the flow; None for a network that predicts something else.

    Args:
        config: configuration of a scheduler of diffusers. An unknown form, which is refused when the flow is made, is
            taken for that of diffusers.
    """
    if not predicts_flow(config):
        return None
    return next((form for form in get_args(FlowForm) if form == config.get("fm_form")), "diffusers")


def has_zero_snr(config: Mapping[str, object]) -> bool:
    """Return whether a scheduler's configuration says that its last timestep is pure noise.

    Args:
        config: configuration of a scheduler of diffusers, with its class.
    """
    return bool(config.get("rescale_betas_zero_snr")) and config.get("_class_name") in _WITH_ZERO_SNR


def check_zero_snr(prediction_type: object, zero_snr: bool) -> None:
    """Refuse a network that predicts the noise where the last timestep is pure noise.

    Args:
        prediction_type: what the network predicts, as in diffusers.
        zero_snr: whether the last timestep is pure noise.

    Raises:
        ModelError: the velocity at the last timestep is undefined.
    """
    if prediction_type == "epsilon" and zero_snr:
        raise ModelError(
            "prediction_type 'epsilon' with zero terminal SNR: pure noise says nothing about"
            " the data, so its velocity is undefined; set rescale_betas_zero_snr to false"
            " (--no_rescale_betas_zero_snr), or use a v-prediction model (--prediction_type v_prediction)"
        )
