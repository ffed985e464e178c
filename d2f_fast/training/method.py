"""Settle the objective of a run, and what depends on it, where the options leave them open. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from d2f_fast.config import DEFAULT_SNR_GAMMA, FlowForm, LossWeighting, ObjectiveName, TrainingConfig
from d2f_fast.errors import ModelError, RefusedInputError, printable


def own_weighting(objective: ObjectiveName, config: TrainingConfig) -> LossWeighting:
    """Return the weighting of the options, or else the one that the objective has where none is given.

    Args:
        objective: name of the objective.
        config: options of a run.
    """
    if config.loss_weighting is not None:
        return config.loss_weighting
    if config.snr_gamma is not None:
        return "min_snr"
    return "native" if objective == "diffusion" else "flow"


def settle_method(config: TrainingConfig, own: FlowForm | None) -> TrainingConfig:
    """Return the options with the objective and what depends on it, as the base model settles where they are open.

    Args:
        config: options of a run.
        own: form in which the base model predicts the flow; None for a model that predicts something else.

    Returns:
        The same options, with an objective, a form where the objective is "fm", a weighting, and the parameters of the
        weighting and of the density of times where these have any.

    Raises:
        RefusedInputError: the base model predicts the flow, and the options ask for another objective or form, or for
            something that has no effect with the objective that is taken.
    """
    if own is None:
        objective, form = config.objective or "diff2flow", config.fm_form or "diffusers"
    else:
        if config.objective not in (None, "fm"):
            lacks = {
                "diff2flow": "there is no diffusion prediction to align",
                "diffusion": "it has no diffusion loss of its own",
            }
            raise RefusedInputError(
                f"objective {config.objective} needs a base model that predicts noise, v or clean latents; this one"
                f" predicts the flow itself (flow_prediction), so that {lacks[config.objective]}: leave --objective out"
            )
        if config.fm_form not in (None, own):
            raise RefusedInputError(
                f"fm_form {config.fm_form} does not fit this base model, which predicts the flow in the form {own}:"
                " leave --fm_form out"
            )
        objective, form = "fm", own
    config = dataclasses.replace(config, objective=objective, fm_form=form if objective == "fm" else config.fm_form)
    # Equal runs get equal options, whether a value was given or is the default: a continuation compares them.
    weighting = own_weighting(objective, config)
    normal = config.timestep_sampling == "logit_normal"
    return dataclasses.replace(
        config,
        loss_weighting=weighting,
        snr_gamma=config.snr_gamma or (DEFAULT_SNR_GAMMA if weighting == "min_snr" else None),
        logit_mean=config.logit_mean or (0.0 if normal else None),
        logit_std=config.logit_std or (1.0 if normal else None),
    )


def check_starting_tags(path: Path, tags: Mapping[str, str], config: TrainingConfig) -> None:
    """Refuse a LoRA that predicts the flow as the start of a run that trains something else.

    Args:
        path: file of the LoRA, for the message.
        tags: its entries that begin with "d2f.".
        config: options from `settle_method`.

    Raises:
        ModelError: the run has another objective or form.
    """
    form = tags.get("d2f.fm_form", "diffusers")
    if tags.get("d2f.prediction_type") != "flow_prediction":
        return
    if config.objective != "fm" or form != (config.fm_form or "diffusers"):
        raise ModelError(
            f"init_lora {path} makes the network predict the flow (form {printable(form)}), and this run trains"
            f" the objective {config.objective}: give --objective fm --fm_form {printable(form)}, or leave it out"
        )
