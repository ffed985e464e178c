"""Match the layers of a LoRA file with the modules of a pipeline, and say what is wrong where they do not fit."""

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from d2f_fast.errors import ModelError
from d2f_fast.lora.file_keys import component_of, describe_network
from d2f_fast.lora.key_names import AdaptableLayer, module_names
from d2f_fast.lora.read import LoraFile

_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_CURE = "give the model that the LoRA was trained on"


def match_layers(lora: LoraFile, pipeline: DiffusionPipeline) -> dict[str, AdaptableLayer]:
    """Return the module of each layer of a LoRA file, by the layer's name in the file.

    Args:
        lora: LoRA file.
        pipeline: Stable Diffusion pipeline, with one or two text encoders.

    Raises:
        ModelError: A layer does not exist in the pipeline or has another shape, or two layers are one module.
    """
    modules = module_names(pipeline)
    missing = [name for name in lora.layers if name not in modules]
    if missing:
        count = f"{len(lora.layers) - len(missing)} of {len(lora.layers)} layers exist in this model"
        raise ModelError(
            f"LoRA {lora.path}: {count}, and {lora.stems[missing[0]]} is {_why_missing(lora, missing, pipeline)}"
        )
    found: dict[str, AdaptableLayer] = {}
    owners: dict[int, str] = {}
    for name, layer in lora.layers.items():
        module = found[name] = modules[name]
        _check_shape(lora, name, layer.shape, module.weight, pipeline)
        other = owners.setdefault(id(module), name)
        if other != name:
            raise ModelError(
                f"LoRA {lora.path}: {lora.stems[other]} and {lora.stems[name]} adapt the same layer: give one LoRA in a"
                " file"
            )
    return found


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


def _why_missing(lora: LoraFile, missing: list[str], pipeline: DiffusionPipeline) -> str:
    """Return why a layer is not in a pipeline, as the end of a sentence."""
    network = describe_network(missing)
    if network is not None:
        return f"of {network}: {_CURE}"
    if family := _other_family(lora, pipeline):
        return f"not one of them: {family}"
    if component_of(missing[0]) == "text_encoder_2" and getattr(pipeline, "text_encoder_2", None) is None:
        return f"of a second text encoder, which only SDXL has: {_CURE}"
    if len(missing) == len(lora.layers):
        return (
            f"not one of them: it is a LoRA of another model, or its layers are named in a way that is unknown: {_CURE}"
        )
    return f"not one of them: {_CURE}"


def _other_family(lora: LoraFile, pipeline: DiffusionPipeline) -> str | None:
    """Return which family a LoRA is for, if the width of its text condition is not that of the pipeline's UNet."""
    own = pipeline.unet.config.cross_attention_dim
    for name, layer in lora.layers.items():
        if "attn2" in name and name.endswith(("to_k", "to_v")) and component_of(name) == "unet":
            width = layer.shape[1]
            if width != own and width in _TEXT_WIDTHS:
                this = _TEXT_WIDTHS.get(own, "another network")
                return (
                    f"it is a LoRA of {_TEXT_WIDTHS[width]} (its text is {width} wide), and this model is {this} (its"
                    f" text is {own} wide): {_CURE}"
                )
            return None
    return None


def _check_shape(
    lora: LoraFile, name: str, shape: tuple[int, int], weight: Tensor, pipeline: DiffusionPipeline
) -> None:
    """Refuse a layer whose update does not have the shape of the weight."""
    expected = (weight.shape[0], weight.shape[1:].numel())
    if shape == expected:
        return
    component = component_of(name)
    what = _other_family(lora, pipeline) or (
        f"it is a LoRA of another model: {_CURE}"
        if component == "unet"
        else f"it is a LoRA for another text encoder: {_CURE}"
    )
    raise ModelError(
        f"LoRA {lora.path}: {lora.stems[name]} changes a weight of {shape[0]} x {shape[1]}, which does not fit this"
        f" model's {expected[0]} x {expected[1]}: {what}"
    )
