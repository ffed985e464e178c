"""Decide from names and shapes alone whether the layers of a LoRA file are those of a model. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from d2f_fast.errors import ModelError, printable
from d2f_fast.lora.file_keys import component_of, describe_network
from d2f_fast.lora.header import LoraHeader
from d2f_fast.lora.original_names import original_unet_name
from d2f_fast.lora.targets import FIRST_LAYER

KOHYA_PREFIX = "lora_unet_"
_TEXT_PREFIXES = {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}
_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_CURE = "give the model that the LoRA was trained on"


@dataclass(frozen=True)
class ModelLayers:
    """Layers of a model that a LoRA can adapt: all linear layers and convolutions.

    Attributes:
        shapes: Shape of each layer's weight, by its name "unet.<module>", "text_encoder.<module>" or
            "text_encoder_2.<module>", in diffusers' words and without the prefix "text_model.".
        unet_config: Configuration of the UNet.
        unknown: Components whose layers are not known, so that they are not compared.
    """

    shapes: Mapping[str, Sequence[int]]
    unet_config: Mapping[str, Any]
    unknown: frozenset[str] = frozenset()

    def names_in_files(self) -> dict[str, str]:
        """Return the name of each layer, by each name that LoRA files use for it."""
        found: dict[str, str] = {}
        for layer in self.shapes:
            component, _, module = layer.partition(".")
            names = (
                unet_names_in_files(module, self.unet_config)
                if component == "unet"
                else _text_names_in_files(component, module)
            )
            found |= dict.fromkeys(names, layer)
        return found

    def unet_layers(self) -> list[str]:
        """Return the names of the UNet's layers in diffusers."""
        return [name.removeprefix("unet.") for name in self.shapes if name.startswith("unet.")]


def unet_names_in_files(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the names that LoRA files use for a layer of a UNet.

    Args:
        name: Name of the layer in diffusers.
        config: Configuration of the UNet, which gives the number of layers in a block.
    """
    names = [f"unet.{name}", f"{KOHYA_PREFIX}{name.replace('.', '_')}"]
    original = original_unet_name(name, config)
    return names if original is None else [*names, f"{KOHYA_PREFIX}{original.replace('.', '_')}"]


def fitted_layers(lora: LoraHeader, model: ModelLayers) -> dict[str, str]:
    """Return the layer of a model that each layer of a LoRA file adapts, by the layer's name in the file.

    Args:
        lora: Header of the file.
        model: Layers of the model. Layers of components that are not known are left out.

    Raises:
        ModelError: A layer does not exist in the model or has another shape, or two layers are one.
    """
    names = model.names_in_files()
    compared = {name: layer for name, layer in lora.layers.items() if component_of(name) not in model.unknown}
    missing = [name for name in compared if name not in names]
    if missing:
        count = f"{len(lora.layers) - len(missing)} of {len(lora.layers)} layers exist in this model"
        raise ModelError(
            f"LoRA {lora.path}: {count}, and {lora.layers[missing[0]].stem} is {_why_missing(lora, missing, model)}"
        )
    owners: dict[str, str] = {}
    for name in compared:
        _check_shape(lora, name, model.shapes[names[name]], model)
        if (other := owners.setdefault(names[name], name)) != name:
            raise ModelError(
                f"LoRA {lora.path}: {lora.layers[other].stem} and {lora.layers[name].stem} adapt the same layer: give"
                " one LoRA in a file"
            )
    return {name: names[name] for name in compared}


def starting_layers(lora: LoraHeader, model: ModelLayers) -> dict[str, str]:
    """Return what `fitted_layers` returns, or refuse a LoRA file that a training cannot start from.

    Args:
        lora: Header of the file.
        model: Layers of the model.

    Raises:
        ModelError: The file does not fit the model, is a DoRA, or adapts no layer of the UNet.
    """
    found = fitted_layers(lora, model)
    for layer in lora.layers.values():
        if layer.is_dora:
            raise ModelError(
                f"LoRA {printable(lora.path)}: {layer.stem} is a DoRA, which a plain LoRA cannot go on from: merge it"
                " into the model first, and start from that model"
            )
    if not any(name.startswith("unet.") for name in found.values()):
        raise ModelError(
            f"LoRA {printable(lora.path)} adapts text encoders only, and training adapts the UNet: give a LoRA of the"
            " UNet, or leave out init_lora"
        )
    return found


def known_layers(lora: LoraHeader, model: ModelLayers) -> dict[str, str]:
    """Return the layer of a model that each layer of a LoRA file names, by the layer's name in the file.

    Args:
        lora: Header of the file.
        model: Layers of the model, whose shapes are not compared. Layers of components that are not known are left out.

    Raises:
        ModelError: A layer is not one of the model's, or occurs twice.
    """
    names = model.names_in_files()
    compared = [name for name in lora.layers if component_of(name) not in model.unknown]
    owners: dict[str, str] = {}
    for name in compared:
        if name not in names:
            raise ModelError(
                f"LoRA {printable(lora.path)}: {printable(name)} is not a layer of this model: give the folder of the"
                " model that the LoRA was trained for as --base_model"
            )
        if owners.setdefault(names[name], name) != name:
            raise ModelError(
                f"LoRA {printable(lora.path)}: {names[name]} is adapted twice, under two names: it is damaged"
            )
    return {name: names[name] for name in compared}


def check_named_as_in_diffusers(lora: LoraHeader) -> None:
    """Refuse a LoRA file whose names depend on a model that is not known.

    Args:
        lora: Header of the file.

    Raises:
        ModelError: A layer does not have its name in diffusers.
    """
    foreign = [name for name in lora.layers if not name.startswith(("unet.", *(f"{e}." for e in _TEXT_PREFIXES)))]
    if foreign:
        raise ModelError(
            f"LoRA {printable(lora.path)}: its layers, such as {printable(foreign[0])}, do not show which model they"
            " are of: give its folder as --base_model"
        )


def check_plain_layers(lora: LoraHeader) -> None:
    """Refuse DoRA, which a LoRA file of another form cannot hold, because it depends on the model's weights.

    Args:
        lora: Header of the file.

    Raises:
        ModelError: A layer is DoRA.
    """
    for name, layer in lora.layers.items():
        if layer.is_dora:
            raise ModelError(
                f"LoRA {printable(lora.path)}: {printable(name)} is DoRA, whose update depends on the model's weights:"
                " merge it into the model, with --lora"
            )


def _text_names_in_files(component: str, module: str) -> list[str]:
    """Return the names that LoRA files use for a layer of a text encoder.

    They have the prefix "text_model.", which transformers has dropped from its module names.
    """
    names = []
    for spelled in (module, f"text_model.{module}"):
        kohya = spelled.replace(".", "_")
        names += [f"{component}.{spelled}", *(f"lora_{prefix}_{kohya}" for prefix in _TEXT_PREFIXES[component])]
    return names


def _why_missing(lora: LoraHeader, missing: list[str], model: ModelLayers) -> str:
    """Return why a layer is not in a model, as the end of a sentence."""
    network = describe_network(missing)
    if network is not None:
        return f"of {network}: {_CURE}"
    if family := _other_family(lora, model):
        return f"not one of them: {family}"
    second = "text_encoder_2"
    if component_of(missing[0]) == second and not any(name.startswith(f"{second}.") for name in model.shapes):
        return f"of a second text encoder, which only SDXL has: {_CURE}"
    if len(missing) == len(lora.layers):
        return (
            f"not one of them: it is a LoRA of another model, or its layers are named in a way that is unknown: {_CURE}"
        )
    return f"not one of them: {_CURE}"


def _other_family(lora: LoraHeader, model: ModelLayers) -> str | None:
    """Return which family a LoRA is for, if the width of its text condition is not that of the model's UNet."""
    own = model.unet_config.get("cross_attention_dim")
    for name, layer in lora.layers.items():
        if "attn2" in name and name.endswith(("to_k", "to_v")) and component_of(name) == "unet":
            width = layer.shape.columns
            if width != own and width in _TEXT_WIDTHS:
                this = _TEXT_WIDTHS.get(own, "another network") if isinstance(own, int) else "another network"
                return (
                    f"it is a LoRA of {_TEXT_WIDTHS[width]} (its text is {width} wide), and this model is {this} (its"
                    f" text is {own} wide): {_CURE}"
                )
            return None
    return None


def _check_shape(lora: LoraHeader, name: str, weight: Sequence[int], model: ModelLayers) -> None:
    """Refuse a layer whose update does not have the shape of the weight."""
    layer = lora.layers[name]
    found, expected = layer.shape[:2], (weight[0], prod(weight[1:]))
    if found == expected:
        return
    if name in unet_names_in_files(FIRST_LAYER, model.unet_config) and found[0] == expected[0]:
        channels = found[1] / prod(weight[2:])
        what = (
            f"it is a LoRA of a network that takes {channels:g} channels, and this one takes {weight[1]} (networks that"
            f" also see an image, as for depth, take more): {_CURE}, or one without its first layer"
        )
    elif component_of(name) == "unet":
        what = _other_family(lora, model) or f"it is a LoRA of another model: {_CURE}"
    else:
        what = _other_family(lora, model) or f"it is a LoRA for another text encoder: {_CURE}"
    raise ModelError(
        f"LoRA {lora.path}: {layer.stem} changes a weight of {found[0]} x {found[1]}, which does not fit this model's"
        f" {expected[0]} x {expected[1]}: {what}"
    )
