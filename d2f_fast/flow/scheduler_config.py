"""Say what a scheduler's configuration states about the flow of its network. Imports no torch."""

from collections.abc import Mapping
from typing import get_args

from d2f_fast.config import FlowForm

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
