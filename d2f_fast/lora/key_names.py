"""Name the layers of a pipeline as LoRA files name them, in the forms of peft, diffusers, kohya and Stability (sgm)."""

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from d2f_fast.lora.original_names import original_unet_name

AdaptableLayer = nn.Linear | nn.Conv2d
KOHYA_PREFIX = "lora_unet_"


def module_names(pipeline: DiffusionPipeline) -> dict[str, AdaptableLayer]:
    """Return every linear and convolution layer of a pipeline, by each name that LoRA files use for it.

    Args:
        pipeline: Stable Diffusion pipeline, with one or two text encoders.
    """
    found: dict[str, AdaptableLayer] = {}
    unet = pipeline.unet
    for name, module in _layers(unet):
        found |= dict.fromkeys(unet_layer_names(name, unet), module)
    for component, prefixes in {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}.items():
        encoder = getattr(pipeline, component, None)
        for name, module in _layers(encoder) if encoder is not None else ():
            # LoRA files have this prefix, which transformers has dropped from its module names.
            bare = name.removeprefix("text_model.")
            for spelled in (bare, f"text_model.{bare}"):
                found[f"{component}.{spelled}"] = module
                for prefix in prefixes:
                    found[f"lora_{prefix}_{spelled.replace('.', '_')}"] = module
    return found


def unet_layer_names(name: str, unet: UNet2DConditionModel) -> list[str]:
    """Return the names that LoRA files use for a layer of a UNet.

    Args:
        name: Name of the layer in diffusers.
        unet: The UNet, whose configuration gives the number of layers in a block.
    """
    names = [f"unet.{name}", f"{KOHYA_PREFIX}{name.replace('.', '_')}"]
    sgm = sgm_name(name, unet)
    return names if sgm is None else [*names, f"{KOHYA_PREFIX}{sgm}"]


def sgm_name(name: str, unet: UNet2DConditionModel) -> str | None:
    """Return the name of a UNet's layer in Stability's own code (sgm), with underscores in place of dots.

    Args:
        name: Name of the layer in diffusers.
        unet: The UNet, whose configuration gives the number of layers in a block.

    Returns:
        The name, or None for a layer that sgm does not have.
    """
    original = original_unet_name(name, unet.config)
    return None if original is None else original.replace(".", "_")


def text_module(name: str) -> str:
    """Return the name of a text encoder's module in LoRA files, which keep the prefix "text_model." of transformers 4.

    Args:
        name: Name of the module, with or without the prefix.
    """
    bare = name.removeprefix("text_model.")
    return bare if bare.startswith("text_projection") else f"text_model.{bare}"


def _layers(model: nn.Module) -> list[tuple[str, AdaptableLayer]]:
    """Return the linear and convolution layers of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptableLayer)]
