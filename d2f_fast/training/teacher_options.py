"""Options of a teacher, whose velocity a network learns in place of the straight line. Imports no torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_fast.config import (
    DEFAULT_CAPTION_DROPOUT,
    PredictionType,
    TrainingConfig,
    check_guidance,
    check_options,
    option,
)
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.lora.family import family_name, family_of_config
from d2f_fast.lora.file_keys import component_of
from d2f_fast.lora.header import LoraHeader
from d2f_fast.lora.source import check_lora_file, parse_lora
from d2f_fast.lora.tags import TASK, lora_tags
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import saved_tags

if TYPE_CHECKING:
    from d2f_fast.models.configs import ModelConfigs

BASE = "base"


@dataclass(frozen=True)
class TeacherOptions:
    """Hold the options of the teacher of a training run.

    Args:
        teacher: Model whose velocity the network learns, at the same noisy latents and time: a Hugging Face id, a
            diffusers pipeline folder, one .safetensors file, or "base" for the starting model itself, before the
            training, which teaches something new only with another objective, guidance or LoRA. "fm" makes a
            rectified-flow model of a diffusion model, and "diffusion" does the reverse (docs/training.md has both
            commands). Only with --task text, and not with --distill or an --init_lora that also changes text encoders.
            Default: none.
        teacher_guidance_scale: Strength of classifier-free guidance that the network learns from the teacher. It is
            then sampled without guidance. 1 and 0 turn it off. Above 1, the teacher is evaluated twice in each step.
            Default: 1.
        teacher_lora: LoRA that are merged into the teacher, each as PATH or PATH:SCALE, as for `d2f sample --lora`. A
            LoRA that also changes text encoders is an error. Default: none.
        teacher_prediction_type: What the teacher predicts, as --prediction_type does for the model. With the teacher
            "base" it may differ from --prediction_type, where the same weights become another kind of model. Default:
            read from the teacher's files.

    Raises:
        RefusedInputError: An option has a value that it does not take, or needs a teacher and there is none.
    """

    teacher: str | None = option("teacher", None, metavar="MODEL")
    teacher_guidance_scale: float | None = option("teacher", None, check_guidance)
    teacher_lora: tuple[str, ...] | None = option("teacher", None, metavar="PATH[:SCALE]")
    teacher_prediction_type: PredictionType | None = option("teacher", None)

    def __post_init__(self) -> None:
        """Refuse values that an option does not take, and options of a teacher without a teacher."""
        check_options(self)
        if self.teacher is not None:
            return
        for declared in dataclasses.fields(self):
            if getattr(self, declared.name) not in (None, ()):
                raise RefusedInputError(f"{declared.name} needs a teacher: add --teacher, or leave {declared.name} out")

    @property
    def guidance_scale(self) -> float:
        """Return the scale of the teacher's guidance; 1 where there is none."""
        return max(self.teacher_guidance_scale or 1.0, 1.0)

    def settle(self, config: TrainingConfig) -> TrainingConfig:
        """Return the options of a run, with the caption dropout that goes with the teacher where it is left open.

        Args:
            config: Options of the run. Without a teacher they are returned as they are.
        """
        if self.teacher is None or config.caption_dropout is not None:
            return config
        # A model with guidance built in is sampled without the empty prompt.
        dropout = 0.0 if self.guidance_scale > 1 else DEFAULT_CAPTION_DROPOUT
        return dataclasses.replace(config, caption_dropout=dropout)


def check_teacher_files(options: TeacherOptions, base: str, base_options: ModelOptions) -> None:
    """Refuse a teacher whose names, configurations and headers show that it cannot teach the base model.

    Args:
        options: Options of the teacher.
        base: Hub id, pipeline folder, or `.safetensors` file of the base model.
        base_options: Options of the base model.

    Raises:
        ModelError: The teacher or a LoRA cannot be loaded, or does not fit the base model.
    """
    if options.teacher is None:
        return
    # Most runs have no teacher.
    from d2f_fast.models.configs import read_configs
    from d2f_fast.models.layers import check_lora_fits

    own = ModelOptions(prediction_type=options.teacher_prediction_type)
    source = (base, base_options) if options.teacher == BASE else (options.teacher, own)
    loras = options.teacher_lora or ()
    for entry in loras:
        check_lora_file(parse_lora(entry).path)
    if options.teacher == BASE:
        check_teacher_task(base, loras)
        for header in check_lora_fits(loras, *source):
            check_teacher_lora(header)
        return

    try:
        teacher_configs = read_configs(options.teacher, own)
    except RefusedInputError as error:
        raise type(error)(f"teacher: {error}") from error
    check_teacher_task(options.teacher, loras)
    base_configs = read_configs(base, base_options)
    if teacher_configs is not None and base_configs is not None:
        check_fits_base(options.teacher, teacher_configs, base_configs, base_options)
    for header in check_lora_fits(loras, *source):
        check_teacher_lora(header)


def check_teacher_task(teacher: str, loras: Sequence[str]) -> None:
    """Refuse a teacher that was not trained to lead from noise to images.

    Args:
        teacher: Hub id, pipeline folder, or `.safetensors` file; "" where no file holds its tags.
        loras: LoRA of the teacher, each as PATH or PATH:SCALE.

    Raises:
        ModelError: It was trained on another task.
        CheckpointError: A file is missing, damaged, or a pickle.
    """
    tagged = {f"teacher_lora {printable(entry)}": lora_tags(parse_lora(entry).path) for entry in loras}
    if teacher:
        tagged[f"teacher {printable(teacher)}"] = saved_tags(teacher)
    for name, tags in tagged.items():
        if (task := tags.get(TASK)) is not None:
            raise ModelError(
                f"{name} was trained with --task {printable(task)}, and a run with a teacher learns a flow from noise"
                " to images: give a teacher of such a flow"
            )


def check_teacher_lora(lora: LoraHeader) -> None:
    """Refuse a LoRA of the teacher that adapts text encoders.

    Args:
        lora: Header of the LoRA file, which fits the teacher.

    Raises:
        ModelError: A layer is one of a text encoder.
    """
    if any(component_of(name) != "unet" for name in lora.layers):
        raise ModelError(
            f"teacher_lora {printable(lora.path)} adapts text encoders, and teacher and student are given the same"
            " text: merge it into the model first (d2f convert MODEL OUTPUT --lora FILE), and start from that model"
        )


def check_no_distillation(*, distills: bool) -> None:
    """Refuse a run with a teacher that learns the jump from noise to image alone.

    Args:
        distills: Whether the run does so (--distill).

    Raises:
        RefusedInputError: It does.
    """
    if distills:
        raise RefusedInputError(
            "distill learns the jump from noise to the image of its pair, and a teacher the velocity along the way:"
            " leave one of the two out"
        )


def check_text_of_start(*, adapts_text: bool) -> None:
    """Refuse a run with a teacher that starts from a LoRA of text encoders.

    Args:
        adapts_text: Whether the LoRA that the run starts from adapts text encoders.

    Raises:
        RefusedInputError: It does.
    """
    if adapts_text:
        raise RefusedInputError(
            "init_lora adapts text encoders, whose text the teacher does not know: merge it into the model first, and"
            " start from that model"
        )


def check_fits_base(teacher: str, configs: "ModelConfigs", base: "ModelConfigs", base_options: ModelOptions) -> None:
    """Refuse a teacher that takes other inputs than the base model.

    Args:
        teacher: Name of the teacher.
        configs: Its configurations.
        base: Configurations of the base model.
        base_options: Options of the base model; where they name another autoencoder or scale, the scale is not
            compared.

    Raises:
        ModelError: The family, the channels or the scale of the latents differ.
    """
    named = f"teacher {printable(Path(teacher).name)}"
    own, other = ((family_of_config(each.unet), each.unet.get("cross_attention_dim")) for each in (base, configs))
    if own != other:
        raise ModelError(
            f"{named} is {family_name(configs.unet)} (text width {other[1]}), and the base model"
            f" {family_name(base.unet)} (text width {own[1]}): give a teacher of the same family"
        )
    for key in ("in_channels", "out_channels"):
        if (its := configs.unet.get(key, 4)) != (ours := base.unet.get(key, 4)):
            raise ModelError(f"{named} has {key} {its}, and the base model {ours}: give a teacher of the same latents")
    scales = [float(each.vae.get("scaling_factor", 0.18215)) for each in (configs, base)]
    replaced = base_options.vae_custom_scale, base_options.pretrained_vae_model_name_or_path
    if replaced == (None, None) and scales[0] != scales[1]:
        raise ModelError(
            f"{named} has latents of the scale {scales[0]:g}, and the base model {scales[1]:g}: give a teacher with the"
            " same autoencoder"
        )
