"""What a model is taken for: its family, prediction type and zero terminal SNR, and where each of them was read."""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import EulerDiscreteScheduler

from d2f_fast.flow.scheduler_config import predicts_flow
from d2f_fast.lora.family import family_name
from d2f_fast.models.options import ModelOptions, check_flow_schedule, check_prediction_type
from d2f_fast.models.reflection_padding import set_reflection_padding

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

_PREDICTION_NAMES = {
    "epsilon": "ε-prediction",
    "v_prediction": "v-prediction",
    "sample": "x0-prediction",
    "flow_prediction": "flow prediction",
}
_SCHEDULE_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
# The noise table of every Stable Diffusion model.
_NOISE_TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# What EulerDiscreteScheduler stores for a terminal alphas_cumprod of exactly zero, so that its own sigmas stay finite.
_LEAST_SNR = 2.0**-24


@dataclass(frozen=True)
class ModelFacts:
    """What a model is taken for, and where each fact was read.

    Args:
        family: Name of the model's family, such as "SD2.x".
        prediction_type: What the network predicts, in diffusers' words.
        prediction_source: Where the prediction type was read.
        zero_snr: Whether the last timestep is pure noise.
        zero_snr_source: Where that was read.
        vae_reflection_padding: Whether the convolutions of the autoencoder pad by reflection.
        dynamic_shifting: Whether the model's own scheduler asks for a shift by the size of the image, which is ignored.
    """

    family: str
    prediction_type: str
    prediction_source: str
    zero_snr: bool
    zero_snr_source: str
    vae_reflection_padding: bool = False
    dynamic_shifting: bool = False

    def __str__(self) -> str:
        """Return the line that a run prints."""
        padding = ", autoencoder padded by reflection (stock pipelines ignore this)" * self.vae_reflection_padding
        padding += ", its shift by image size (use_dynamic_shifting) is ignored" * self.dynamic_shifting
        prediction = _PREDICTION_NAMES.get(self.prediction_type, self.prediction_type)
        if self.prediction_type == "flow_prediction":  # It has no noise table, and starts from pure noise.
            return f"{self.family}, {prediction} ({self.prediction_source}){padding}"
        zero_snr = "zero terminal SNR" if self.zero_snr else "no zero terminal SNR"
        return f"{self.family}, {prediction} ({self.prediction_source}), {zero_snr} ({self.zero_snr_source}){padding}"


def state_facts(pipeline: "DiffusionPipeline", options: ModelOptions, source: str | ModelFacts) -> ModelFacts:
    """Make a pipeline's scheduler and padding agree with the options, and return what the model is then taken for.

    Args:
        pipeline: Pipeline of any model. Its scheduler is replaced where an option differs from its configuration; where
            that belongs to a network that predicts the flow, and the option names a diffusion prediction, it is one
            with the noise table of Stable Diffusion.
        options: Options of the base model; those that are given come before everything else.
        source: Name of the place that the scheduler's configuration comes from, such as "scheduler_config.json"; or
            the facts themselves, for a model without a scheduler configuration of its own.

    Raises:
        ModelError: The prediction type that the model's files name is none.
        RefusedInputError: An option of the noise schedule is given for a model that predicts the flow.
    """
    changes: dict[str, Any] = {}
    vae = getattr(pipeline, "vae", None)
    if options.prediction_type is not None:
        changes["prediction_type"] = options.prediction_type
    if options.rescale_betas_zero_snr is not None:
        changes["rescale_betas_zero_snr"] = options.rescale_betas_zero_snr
    found = _facts_of_scheduler(pipeline, source) if isinstance(source, str) else source
    prediction_type = options.prediction_type or found.prediction_type
    check_prediction_type(prediction_type, found.prediction_source)
    if prediction_type == "flow_prediction":
        check_flow_schedule(options, f"a model that predicts the flow ({found.prediction_source})")
    if changes and prediction_type != "flow_prediction" and predicts_flow(pipeline.scheduler.config):
        # The scheduler of a rectified flow states no noise table, but the defaults of its class.
        pipeline.scheduler = EulerDiscreteScheduler(**_NOISE_TABLE, **changes)
    elif changes:
        pipeline.scheduler = same_schedule(pipeline.scheduler, type(pipeline.scheduler), **changes)
    given = "option --{}"
    return ModelFacts(
        found.family,
        options.prediction_type or found.prediction_type,
        given.format("prediction_type") if options.prediction_type else found.prediction_source,
        _has_zero_snr(pipeline.scheduler),
        found.zero_snr_source
        if options.rescale_betas_zero_snr is None
        else given.format(f"{'' if options.rescale_betas_zero_snr else 'no_'}rescale_betas_zero_snr"),
        vae is not None and set_reflection_padding(vae, options.vae_reflection_padding),
        bool(pipeline.scheduler.config.get("use_dynamic_shifting")),
    )


def same_schedule(scheduler: "SchedulerMixin", kind: type["SchedulerMixin"], **changes: Any) -> "SchedulerMixin":
    """Return a scheduler of a class with the noise table and the prediction type of another scheduler.

    Args:
        scheduler: Scheduler whose configuration is taken.
        kind: Class of the new scheduler. EulerDiscreteScheduler takes its place where zero terminal SNR is asked for
            and the class has none.
        changes: Entries of the configuration that replace those of `scheduler`.
    """
    config = dict(scheduler.config)
    # Named, because diffusers would replace what the base left at its default by the defaults of another class.
    stated = {name: config[name] for name in _SCHEDULE_KEYS if name in config} | changes
    if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
        if changes.get("rescale_betas_zero_snr"):
            kind = EulerDiscreteScheduler
        else:
            stated.pop("rescale_betas_zero_snr", None)
            config.pop("rescale_betas_zero_snr", None)
    return kind.from_config(config, **stated)


def _facts_of_scheduler(pipeline: "DiffusionPipeline", source: str) -> ModelFacts:
    """Return what a pipeline's own configuration says."""
    unet, scheduler = getattr(pipeline, "unet", None), pipeline.scheduler
    config = scheduler.config
    defaults = config.get("_use_default_values", [])
    default = f"default of diffusers' {type(scheduler).__name__}"
    sources = {
        name: default if name in defaults or name not in config else source
        for name in ("prediction_type", "rescale_betas_zero_snr")
    }
    # diffusers' own flow-matching schedulers have no prediction type, but can only belong to such networks.
    is_flow = "prediction_type" not in config and predicts_flow(config)
    of_unet = unet.config if unet is not None and type(unet).__name__ == "UNet2DConditionModel" else {}
    return ModelFacts(
        family_name(of_unet),
        "flow_prediction" if is_flow else str(config.get("prediction_type")),
        source if is_flow else sources["prediction_type"],
        _has_zero_snr(scheduler),
        sources["rescale_betas_zero_snr"],
    )


def _has_zero_snr(scheduler: "SchedulerMixin") -> bool:
    """Return whether the last timestep of a scheduler's noise table is pure noise."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        return False
    last = float(table[-1])
    return last == 0 or (bool(scheduler.config.get("rescale_betas_zero_snr")) and last <= _LEAST_SNR)
