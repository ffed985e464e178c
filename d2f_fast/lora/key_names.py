"""Name the layers of a pipeline as LoRA files name them, in the forms of peft, diffusers, kohya and Stability (sgm)."""

import re

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

AdaptableLayer = nn.Linear | nn.Conv2d
KOHYA_PREFIX = "lora_unet_"

# Names of Stability's own code, sgm, for the layers of a residual block and for the first and last layers.
_SGM_LEAVES = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
}
_SGM_ENDS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


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
    if name in _SGM_ENDS:
        return _SGM_ENDS[name]
    per_block = unet.config.layers_per_block + 1 if isinstance(unet.config.layers_per_block, int) else 0
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if found and per_block:
        way, kind, leaf = found[1], found[3], found[5]
        block, layer = int(found[2]), int(found[4])
        if kind == "downsamplers":
            return f"input_blocks_{per_block * (block + 1)}_0_op"
        if kind == "upsamplers":
            place = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            return f"output_blocks_{per_block * (block + 1) - 1}_{place}_conv"
        index = per_block * block + layer + (1 if way == "down" else 0)
        blocks = "input_blocks" if way == "down" else "output_blocks"
        if kind == "resnets":
            return f"{blocks}_{index}_0_{_SGM_LEAVES.get(leaf, leaf.replace('.', '_'))}"
        return f"{blocks}_{index}_1_{leaf.replace('.', '_')}"
    found = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    if found[1] == "resnets":
        return f"middle_block_{2 * int(found[2])}_{_SGM_LEAVES.get(found[3], found[3].replace('.', '_'))}"
    return f"middle_block_1_{found[3].replace('.', '_')}"


def _layers(model: nn.Module) -> list[tuple[str, AdaptableLayer]]:
    """Return the linear and convolution layers of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptableLayer)]
