"""Name the layers of a pipeline as LoRA files name them, in the forms of peft, diffusers, kohya and Stability (sgm)."""

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from d2f_fast.lora.fit import ModelLayers, unet_names_in_files
from d2f_fast.lora.original_names import original_unet_name

AdaptableLayer = nn.Linear | nn.Conv2d


def adaptable_layers(pipeline: DiffusionPipeline) -> dict[str, AdaptableLayer]:
    """Return every linear and convolution layer of a pipeline, by the names of `ModelLayers`.

    Args:
        pipeline: Stable Diffusion pipeline, with one or two text encoders.
    """
    return {
        f"{component}.{name.removeprefix('text_model.')}": module
        for component in ("unet", "text_encoder", "text_encoder_2")
        if (model := getattr(pipeline, component, None)) is not None
        for name, module in model.named_modules()
        if isinstance(module, AdaptableLayer)
    }


def layers_of(pipeline: DiffusionPipeline) -> ModelLayers:
    """Return the names and shapes of the layers of a pipeline.

    Args:
        pipeline: Stable Diffusion pipeline, with one or two text encoders.
    """
    shapes = {name: tuple(module.weight.shape) for name, module in adaptable_layers(pipeline).items()}
    return ModelLayers(shapes, pipeline.unet.config)


def module_names(pipeline: DiffusionPipeline) -> dict[str, AdaptableLayer]:
    """Return every linear and convolution layer of a pipeline, by each name that LoRA files use for it.

    Args:
        pipeline: Stable Diffusion pipeline, with one or two text encoders.
    """
    modules = adaptable_layers(pipeline)
    return {spelled: modules[name] for spelled, name in layers_of(pipeline).names_in_files().items()}


def unet_layer_names(name: str, unet: UNet2DConditionModel) -> list[str]:
    """Return the names that LoRA files use for a layer of a UNet.

    Args:
        name: Name of the layer in diffusers.
        unet: The UNet, whose configuration gives the number of layers in a block.
    """
    return unet_names_in_files(name, unet.config)


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
