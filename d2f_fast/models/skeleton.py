"""Build a pipeline's networks without weights, to name its layers: nothing is read but configurations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.json_file import read_json
from d2f_fast.lora.family import Family
from d2f_fast.models.single_file_header import family_table


@dataclass(frozen=True)
class Skeleton:
    """Networks of a pipeline, without weights.

    Attributes:
        unet: UNet on the meta device.
        text_encoder: Text encoder on the meta device.
        text_encoder_2: Second text encoder of SDXL on the meta device, or None.
    """

    unet: UNet2DConditionModel
    text_encoder: nn.Module
    text_encoder_2: nn.Module | None


def skeleton_of_family(family: Family) -> Skeleton:
    """Return the networks of a family's published model, without weights.

    Args:
        family: Family of the model.
    """
    table = family_table(family)
    return _build(table["unet"], table["text_encoder"], table.get("text_encoder_2"))


def skeleton_of_folder(folder: Path) -> Skeleton:
    """Return the networks of a pipeline folder, without weights.

    Args:
        folder: Folder of a Stable Diffusion pipeline in diffusers' layout.

    Raises:
        CheckpointError: A configuration is missing or not JSON.
        ModelError: A configuration does not fit its network.
    """
    names = ("unet", "text_encoder", "text_encoder_2")
    configs = {
        name: read_json(folder / name / "config.json")
        for name in names
        if name != "text_encoder_2" or (folder / name).is_dir()
    }
    try:
        return _build(configs["unet"], configs["text_encoder"], configs.get("text_encoder_2"))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{printable(folder)}: a config.json does not fit its network ({' '.join(str(error).split())}): restore it"
            " from the base model"
        ) from error


def _build(unet: Mapping[str, Any], text: Mapping[str, Any], second: Mapping[str, Any] | None) -> Skeleton:
    """Return networks of the given configurations on the meta device."""
    with torch.device("meta"):
        return Skeleton(
            UNet2DConditionModel.from_config(dict(unet)),
            CLIPTextModel(CLIPTextConfig.from_dict(dict(text))),
            None if second is None else CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(second))),
        )
