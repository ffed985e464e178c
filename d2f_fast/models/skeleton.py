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

# What decides the names of a UNet's layers, and the shapes of those that tell the families apart.
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}
_UNETS: dict[Family, dict[str, Any]] = {
    "sd1": {**_FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_FOUR_LEVELS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (_PLAIN, _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}


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
    text = _CLIP_H if family == "sd2" else _CLIP_L
    return _build(_UNETS[family], text, _CLIP_G | {"projection_dim": 1280} if family == "sdxl" else None)


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
