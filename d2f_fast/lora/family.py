"""Recognise the family of a Stable Diffusion network, which decides how other programs name its layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.errors import ModelError, printable

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Family = Literal["sd1", "sd2", "sdxl"]
# What messages call each family.
FAMILY_NAMES: dict[Family, str] = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}
# Entries of the configuration of the miniature's UNet by which it is recognised.
_MINIATURE = {"cross_attention_dim": 128, "layers_per_block": 1, "block_out_channels": [48, 96]}

# Width of the text condition, which no finetune of a family changes.
_FAMILY_OF_TEXT_WIDTH: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def family_of(unet: "UNet2DConditionModel") -> Family | None:
    """Return the family of a UNet, from its configuration alone.

    Args:
        unet: UNet of any pipeline.

    Returns:
        "sd1" for Stable Diffusion 1.x, "sd2" for 2.x, "sdxl" for SDXL's base, or None for any other network.
    """
    return family_of_config(unet.config)


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """Return the family of the UNet that has a configuration; see `family_of`.

    Args:
        config: Content of the UNet's config.json.
    """
    width = config.get("cross_attention_dim")
    family = _FAMILY_OF_TEXT_WIDTH.get(width) if isinstance(width, int) else None
    return family if (config.get("addition_embed_type") == "text_time") == (family == "sdxl") else None


def family_name(config: Mapping[str, Any]) -> str:
    """Return what messages call the UNet that has a configuration: its family, "the miniature", or neither of them.

    Args:
        config: Content of the UNet's config.json.
    """
    if (family := family_of_config(config)) is not None:
        return FAMILY_NAMES[family]
    levels = list(config.get("block_out_channels") or ())  # diffusers holds it as a tuple.
    if {**{name: config.get(name) for name in _MINIATURE}, "block_out_channels": levels} == _MINIATURE:
        return "the miniature"
    return "a UNet other than SD1.x, SD2.x and SDXL"


def family_of_text_width(width: int) -> Family | None:
    """Return the family whose text condition has a width, or None.

    Args:
        width: Number of features of the text condition, the input width of the cross-attention's keys.
    """
    return _FAMILY_OF_TEXT_WIDTH.get(width)


def unknown_family(path: Path) -> ModelError:
    """Return the error of a kohya file that cannot be named, because nothing says which model its LoRA is of.

    Args:
        path: The kohya file.
    """
    return ModelError(
        f"{printable(path)}: the names in a kohya file depend on the model, which the LoRA does not show: give its"
        " folder as --base_model"
    )


def has_sizes_condition(unet: "UNet2DConditionModel") -> bool:
    """Return whether a UNet takes pooled text and image sizes besides the time, as SDXL's do."""
    return bool(unet.config.addition_embed_type == "text_time")
