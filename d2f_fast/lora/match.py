"""Match the layers of a LoRA file with the modules of a pipeline."""

from diffusers import DiffusionPipeline
from torch import nn

from d2f_fast.lora.fit import fitted_layers
from d2f_fast.lora.key_names import AdaptableLayer, adaptable_layers, layers_of
from d2f_fast.lora.read import LoraFile


def match_layers(lora: LoraFile, pipeline: DiffusionPipeline) -> dict[str, AdaptableLayer]:
    """Return the module of each layer of a LoRA file, by the layer's name in the file.

    Args:
        lora: LoRA file.
        pipeline: Stable Diffusion pipeline, with one or two text encoders.

    Raises:
        ModelError: A layer does not exist in the pipeline or has another shape, or two layers are one module.
    """
    modules = adaptable_layers(pipeline)
    return {name: modules[layer] for name, layer in fitted_layers(lora.about, layers_of(pipeline)).items()}


def modules_by_canonical_name(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return every module by its name "unet.<module>", "text_encoder.<module>" or "text_encoder_2.<module>".

    The prefix "text_model.", which transformers has dropped from its module names, is left out.

    Args:
        pipeline: Stable Diffusion pipeline, with one or two text encoders.
    """
    return {
        f"{component}.{name.removeprefix('text_model.')}": module
        for component in ("unet", "text_encoder", "text_encoder_2")
        if (model := getattr(pipeline, component, None)) is not None
        for name, module in model.named_modules()
    }


def canonical_names(pipeline: DiffusionPipeline) -> dict[int, str]:
    """Return the names of `modules_by_canonical_name` by the id of the module."""
    return {id(module): name for name, module in modules_by_canonical_name(pipeline).items()}
