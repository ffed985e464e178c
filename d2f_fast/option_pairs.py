"""Refuse pairs of training options of which one would make the other void.

Only an option that was given can be void, so that the options below have None as their default where any of their
values may be given on purpose. An option that states what is done anyway is accepted. This module imports no torch.
"""

from typing import TYPE_CHECKING

from d2f_fast.errors import RefusedInputError

if TYPE_CHECKING:
    from d2f_fast.config import TrainingConfig

_MAX_STEP = 1 << 20  # Images of a step, of which the order is held in memory.
# The weightings that each objective takes, and what to do in place of another one.
_WEIGHTINGS = {
    "diff2flow": (("flow", "native", "min_snr"), ""),
    "fm": (("flow",), "leave it out"),
    "diffusion": (("native", "min_snr"), "leave it out, the loss is weighted as that of the base model"),
}
# Options that must keep their value with the objective "diffusion", and what to do in their place.
_FIXED_BY_DIFFUSION = {
    "timestep_sampling": ("uniform", "leave it out, whole timesteps are sampled evenly"),
    "flow_shift": (1.0, "leave it out, or give --sampling_shift to save a shift for sampling"),
}
# Values that options keep where one time alone is trained.
_WITHOUT_EFFECT_AT_ONE_TIME: "dict[str, tuple[object, ...]]" = {
    "timestep_sampling": ("uniform",),
    "flow_shift": (1.0,),
    "loss_weighting": (None, "flow"),
    "snr_gamma": (None,),
}
# Options of the LoRA. A full finetuning takes them only where they state that there are no such layers.
_OF_THE_LORA = ("init_lora", "rank", "lora_alpha", "conv_rank", "first_last_layers", "target_modules", "lora_format")


def check_pairs(config: "TrainingConfig") -> None:
    """Refuse options that contradict each other, or of which one would have no effect.

    Args:
        config: Options of a run. An `objective` of None is checked again when the base model has settled it.

    Raises:
        RefusedInputError: An option does not go with another; the message says what to leave out or to add.
    """
    _check_objective(config)
    _check_distillation(config)
    _check_weighting(config)
    _check_times(config)
    _check_adapter(config)
    _check_schedule(config)
    if (size := config.train_batch_size * config.gradient_accumulation_steps) > _MAX_STEP:
        raise RefusedInputError(
            f"train_batch_size times gradient_accumulation_steps must be at most {_MAX_STEP:,}, got {size}"
        )
    if config.validation_prompts and not config.validation_steps:
        raise RefusedInputError(
            "validation_prompts needs validation_steps, how often images are generated: add --validation_steps 500"
        )
    if config.cache_latents and not config.center_crop:
        raise RefusedInputError(
            "cache_latents needs center_crop, because a random crop differs each time: add --no_cache_latents, or"
            " leave --no_center_crop out"
        )


def _check_objective(config: "TrainingConfig") -> None:
    """Refuse what does not go with the objective."""
    if config.objective == "diffusion":
        for name, (value, cure) in _FIXED_BY_DIFFUSION.items():
            if (given := getattr(config, name)) != value:
                raise RefusedInputError(f"{name} must be {value} with the objective diffusion, got {given}: {cure}")
    if config.fm_form is not None and config.objective not in ("fm", None):
        raise RefusedInputError(
            f"fm_form {config.fm_form} does not go with the objective {config.objective}: add --objective fm, or leave"
            " fm_form out"
        )


def _check_distillation(config: "TrainingConfig") -> None:
    """Refuse what has no effect, or another meaning, where the start of the flow is the only time that is trained."""
    if config.lpips_weight and not config.distill:
        raise RefusedInputError(
            f"lpips_weight works only with distill, whose prediction is an image, got {config.lpips_weight:g}: add"
            " --distill, or leave lpips_weight out"
        )
    if config.lpips_net != "vgg" and not config.lpips_weight:
        raise RefusedInputError(
            f"lpips_net {config.lpips_net} has no effect without LPIPS in the loss: add --lpips_weight 1, or leave"
            " lpips_net out"
        )
    if not config.distill:
        return
    if config.objective == "diffusion":
        raise RefusedInputError(
            "distill does not go with the objective diffusion, whose first timestep is not pure noise: give --objective"
            " diff2flow"
        )
    for name, values in _WITHOUT_EFFECT_AT_ONE_TIME.items():
        if (given := getattr(config, name)) not in values:
            raise RefusedInputError(
                f"{name} has no effect with distill, which trains one time alone, got {given}: leave it out"
            )


def _check_weighting(config: "TrainingConfig") -> None:
    """Refuse a weighting that the objective does not take, and a gamma that nothing uses."""
    weighting = config.loss_weighting
    if config.objective is not None and weighting is not None:
        weightings, cure = _WEIGHTINGS[config.objective]
        if weighting not in weightings:
            raise RefusedInputError(
                f"loss_weighting must be {' or '.join(weightings)} with the objective {config.objective}, got"
                f" {weighting}: {cure}"
            )
    if config.snr_gamma is not None and weighting not in (None, "min_snr"):
        raise RefusedInputError(
            f"snr_gamma works only with loss_weighting min_snr, got {weighting}: leave one of the two out"
        )
    if config.snr_gamma is not None and config.objective == "fm":
        raise RefusedInputError(
            "snr_gamma does not go with the objective fm, whose times have no SNR of the model: leave snr_gamma out"
        )


def _check_times(config: "TrainingConfig") -> None:
    """Refuse parameters of a density of times that is not used."""
    for name in ("logit_mean", "logit_std"):
        if getattr(config, name) is not None and config.timestep_sampling != "logit_normal":
            raise RefusedInputError(
                f"{name} works only with timestep_sampling logit_normal, got {config.timestep_sampling}: add"
                f" --timestep_sampling logit_normal, or leave {name} out"
            )


def _check_adapter(config: "TrainingConfig") -> None:
    """Refuse options of the LoRA in a full finetuning, which has none."""
    if config.adapter == "lora":
        return
    for name in _OF_THE_LORA:
        if getattr(config, name) not in (None, 0):
            merge = ", or merge the LoRA into the model first" if name == "init_lora" else ""
            raise RefusedInputError(f"{name} needs --adapter lora: leave {name} out{merge}")


def _check_schedule(config: "TrainingConfig") -> None:
    """Refuse a warm-up that the schedule ignores, and the schedule that is nothing but a warm-up without its length."""
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        raise RefusedInputError(
            f"lr_warmup_steps has no effect with lr_scheduler constant, got {config.lr_warmup_steps}: add"
            " --lr_scheduler constant_with_warmup, or leave lr_warmup_steps out"
        )
    if config.lr_scheduler == "constant_with_warmup" and not config.lr_warmup_steps:
        raise RefusedInputError(
            "lr_scheduler constant_with_warmup needs the length of the warm-up: add --lr_warmup_steps, or leave"
            " lr_scheduler out"
        )
