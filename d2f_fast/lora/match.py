"""Match the layers of a LoRA file with the modules of a pipeline."""

from diffusers import DiffusionPipeline

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
