"""Name the layers of a UNet as in the original code of CompVis (ldm) and Stability (sgm), from diffusers' names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_RESIDUAL_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_LAYERS_AT_THE_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
# What diffusers takes where a config.json does not say it.
_LAYERS_PER_BLOCK = 2
_UP_BLOCK_TYPES = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)


def original_unet_name(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of a UNet's layer in the original code.

    Args:
        name: Name of the layer in diffusers, such as "down_blocks.0.resnets.1.conv1".
        config: Configuration of the UNet in diffusers, which gives the number of layers in a block.

    Returns:
        The name, such as "input_blocks.2.0.in_layers.2", or None for a layer that the original code does not have.
    """
    if name in _LAYERS_AT_THE_ENDS:
        return _LAYERS_AT_THE_ENDS[name]
    found = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if found:
        kind, leaf = found[1], found[3]
        if kind == "resnets":
            return f"middle_block.{2 * int(found[2])}.{_RESIDUAL_LAYERS.get(leaf, leaf)}"
        return f"middle_block.1.{leaf}"
    layers = config.get("layers_per_block", _LAYERS_PER_BLOCK)
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if found is None or not isinstance(layers, int):
        return None
    way, block, kind, layer, leaf = found[1], int(found[2]), found[3], int(found[4]), found[5]
    # A block of the original code is one layer, and the sampler that follows the layers of a diffusers block.
    per_block = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{per_block * (block + 1)}.0.op"
    if kind == "upsamplers":
        types = config.get("up_block_types", _UP_BLOCK_TYPES)
        if block >= len(types):
            return None
        place = 2 if "Attn" in types[block] else 1
        return f"output_blocks.{per_block * (block + 1) - 1}.{place}.conv"
    blocks, index = ("input_blocks", per_block * block + layer + 1) if way == "down" else ("output_blocks", 0)
    if way == "up":
        index = per_block * block + layer
    if kind == "resnets":
        return f"{blocks}.{index}.0.{_RESIDUAL_LAYERS.get(leaf, leaf)}"
    return f"{blocks}.{index}.1.{leaf}"


def diffusers_unet_name(original: str, config: Mapping[str, Any]) -> str | None:
    """Return the name in diffusers of a UNet's layer in the original code: the inverse of `original_unet_name`.

    Args:
        original: Name of the layer, such as "input_blocks.2.0.in_layers.2".
        config: Configuration of the UNet in diffusers, which gives the number of layers in a block.

    Returns:
        The name, or None for a layer that diffusers does not have.
    """
    return next((name for name in _candidates(original, config) if original_unet_name(name, config) == original), None)


def _candidates(original: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in diffusers that a layer of the original code may have."""
    yield from (name for name, at_end in _LAYERS_AT_THE_ENDS.items() if at_end == original)
    if found := re.fullmatch(r"middle_block\.(\d+)\.(.+)", original):
        kind, index = ("attentions", 0) if found[1] == "1" else ("resnets", int(found[1]) // 2)
        yield from (f"mid_block.{kind}.{index}.{leaf}" for leaf in _leaves(found[2]))
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", original)
    layers = config.get("layers_per_block", _LAYERS_PER_BLOCK)
    if found is None or not isinstance(layers, int):
        return
    if found[1] == "input":
        block, layer = divmod(int(found[2]) - 1, layers + 1)
        way, sampler = "down", "downsamplers"
    else:
        block, layer = divmod(int(found[2]), layers + 1)
        way, sampler = "up", "upsamplers"
    yield f"{way}_blocks.{block}.{sampler}.0.conv"
    for kind in ("resnets", "attentions"):
        yield from (f"{way}_blocks.{block}.{kind}.{layer}.{leaf}" for leaf in _leaves(found[4]))


def _leaves(original: str) -> list[str]:
    """Return the names that the end of an original name has in diffusers."""
    return [name for name, leaf in _RESIDUAL_LAYERS.items() if leaf == original] or [original]
