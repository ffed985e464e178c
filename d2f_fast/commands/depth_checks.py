"""Refuse, before torch is imported, a model or a LoRA that predicts no depth."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import get_args

from d2f_fast.data.depth_options import DepthNormalization
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.image_sizes import first_size
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.tags import common_tags, predicts_depth, tags_with_lora
from d2f_fast.models.configs import check_one_text_encoder, read_configs
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import saved_tags, tags_source

_TRAIN = "train one with d2f train --task depth"


def check_depth_model(model: str, lora: Sequence[str], options: ModelOptions) -> None:
    """Refuse a model that its configuration shows to predict no depth.

    Args:
        model: Hub id, pipeline folder, or `.safetensors` file.
        lora: LoRA as PATH or PATH:SCALE.
        options: Options of the model.

    Raises:
        RefusedInputError: The model cannot be used.
    """
    configs = read_configs(model, options)
    if configs is None:
        depth_tags(model, lora)
        return
    latents, channels = configs.vae.get("latent_channels", 4), configs.unet.get("in_channels", 4)
    if channels == latents and not lora:
        raise ModelError(
            f"{printable(model)} is a text-to-image model, which sees no image: give the folder pipeline of a run of"
            f" d2f train --task depth, or its LoRA with --lora; or {_TRAIN}"
        )
    if channels not in (latents, 2 * latents):
        raise ModelError(f"{printable(model)} takes {channels} channels, and depth needs {2 * latents}: {_TRAIN}")
    check_one_text_encoder(configs.text_encoders)
    depth_tags(model, lora)


def check_ensemble(ensemble_size: int) -> None:
    """Refuse several predictions where the library that aligns them is missing.

    Args:
        ensemble_size: Number of predictions of each image.

    Raises:
        RefusedInputError: SciPy is needed and not installed.
    """
    if ensemble_size > 1 and find_spec("scipy") is None:
        raise RefusedInputError(
            "ensemble_size needs SciPy, which is not installed: pip install scipy, which the extra [depth] of this"
            " package installs, too; or leave it out"
        )


def depth_tags(model: str, lora: Sequence[str]) -> dict[str, str]:
    """Return the tags of the model with the LoRA; see `tags_with_lora`.

    Args:
        model: Hub id or folder of the model.
        lora: LoRA as PATH or PATH:SCALE.

    Returns:
        The tags; none for a folder of another program.

    Raises:
        ModelError: The LoRA, or the model, was trained on something else, or a tag has a value that it cannot have.
    """
    tags = tags_with_lora(saved_tags(model), common_tags([parse_lora(entry).path for entry in lora]))
    source = ", ".join(lora) or tags_source(model)
    if (lora or tags) and not predicts_depth(tags):
        raise ModelError(f"{printable(source)} was not trained on depth: give what d2f train --task depth made")
    if (word := tags.get("d2f.depth_normalization", "affine")) not in get_args(DepthNormalization):
        raise ModelError(
            f"{printable(source)}: d2f.depth_normalization must be {', '.join(get_args(DepthNormalization))}, got"
            f" {printable(str(word)[:100])}: {_TRAIN}"
        )
    try:
        first_size(tags.get("d2f.resolution", "1"))
    except ValueError as error:
        raise ModelError(
            f"{printable(source)}: d2f.resolution {printable(error)}: correct the entry, or save the file again with"
            " d2f_fast"
        ) from error
    return tags
