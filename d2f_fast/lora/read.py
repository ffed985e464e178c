"""Merge LoRA files into a pipeline's float32 weights, before anything is traced: W += scale * (alpha / r) * B A.

Understood are peft's keys (`unet.….lora_A.weight`, the scale in the header or folded), diffusers' older `.lora.down.`,
and kohya's (`lora_unet_…`, `lora_te_…`, `lora_te1_…`, `lora_te2_…`), with diffusers' or SDXL's sgm block names.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from d2f_fast.training.checkpoint import read_tensors
from d2f_fast.errors import ModelError
from d2f_fast.lora.inject import LORA_FILE

_HALVES = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora.down.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora.up.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
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


@torch.no_grad()
def fuse_adapter(pipeline: Any, source: Path, scale: float) -> dict[str, Any]:
    """Add a LoRA to the weights of a pipeline's UNet and text encoders; nothing of it remains but the sum.

    Args:
        pipeline: in float32.
        source: .safetensors file, or the folder of pytorch_lora_weights.safetensors.
        scale: factor on the whole adapter.

    Returns:
        What was done: file, sha256, scale, layers, and the norm of the change in all and beside the weights'.

    Raises:
        ModelError: no LoRA file, another kind of adapter, or one of another model; no weight was changed.
    """
    path = source / LORA_FILE if source.is_dir() else source
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not safetensors, other formats can run code: convert it to safetensors first")
    tensors, header = read_tensors(path)
    layers: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, value in tensors.items():
        suffix = next((suffix for suffix in _HALVES if key.endswith(suffix)), None)
        if suffix is None:
            foreign.append(key)
        else:
            layers.setdefault(key.removesuffix(suffix), {})[_HALVES[suffix]] = value
    if foreign or not layers:
        raise ModelError(
            f"LoRA {path}: {(foreign or ['nothing'])[0]} is no LoRA weight: only peft and kohya LoRA files merge"
        )
    modules = module_names(pipeline)
    missing = [name for name in layers if name not in modules]
    if missing:
        raise ModelError(
            f"LoRA {path}: {len(layers) - len(missing)} of {len(layers)} layers match this model, not {missing[0]}:"
            " it is of another model (SDXL LoRA on SD1.5?)"
        )
    metadata = _metadata(path, header)
    deltas = {name: _delta(path, name, half, modules[name], metadata) for name, half in layers.items()}
    change = math.sqrt(sum(delta.square().sum().item() for delta in deltas.values())) * abs(scale)
    if not 0 < change < math.inf:
        what = "holds NaN or infinity" if scale and change else "changes nothing"
        raise ModelError(f"LoRA {path} {what}: all of its updates add up to {change}")
    weights = math.sqrt(sum(modules[name].weight.square().sum().item() for name in deltas))
    for name, delta in deltas.items():
        modules[name].weight += scale * delta
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scale": scale,
        "layers": len(deltas),
        "change": change,
        "relative_change": change / weights,
    }


def module_names(pipeline: Any) -> dict[str, Any]:
    """Every linear and convolution layer of a pipeline, by each name that LoRA files have for it."""
    found: dict[str, Any] = {}
    unet = pipeline.unet
    for name, module in _layers(unet):
        found[f"unet.{name}"] = module
        found[f"lora_unet_{name.replace('.', '_')}"] = module
        sgm = sgm_name(name, unet)
        if sgm is not None:
            found[f"lora_unet_{sgm}"] = module
    for component, prefixes in {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}.items():
        encoder = getattr(pipeline, component, None)
        for name, module in _layers(encoder) if encoder is not None else ():
            # transformers has dropped this prefix from its module names; files have it.
            bare = name.removeprefix("text_model.")
            for spelled in (bare, f"text_model.{bare}"):
                found[f"{component}.{spelled}"] = module
                for prefix in prefixes:
                    found[f"lora_{prefix}_{spelled.replace('.', '_')}"] = module
    return found


def sgm_name(name: str, unet: Any) -> str | None:
    """Name of a UNet's layer in Stability's own code, dots as underscores; None for what that code has not."""
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


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _delta(path: Path, name: str, half: Mapping[str, Tensor], module: Any, metadata: Mapping[str, Any]) -> Tensor:
    """(alpha / r) * B A in the shape of the module's weight, float32."""
    own = module.weight.shape
    if "down" not in half or "up" not in half:
        raise ModelError(f"LoRA {path}: {name} lacks one of its two matrices: the file is not whole")
    down, up = half["down"].float().flatten(1), half["up"].float().flatten(1)
    if up.shape[1] != down.shape[0] or up.shape[0] != own[0] or down.shape[1] != own[1:].numel():
        raise ModelError(
            f"LoRA {path}: {name} is {list(half['up'].shape)} times {list(half['down'].shape)}, which does not fit this"
            f" model's {list(own)}: it is of another model"
        )
    rank = down.shape[0]
    factor = half["alpha"].item() / rank if "alpha" in half else _header_factor(path, name, rank, metadata)
    return ((up @ down) * factor).reshape(own)


def _metadata(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration in a file's header, empty where there is none."""
    try:
        metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ModelError(f"LoRA {path}: lora_adapter_metadata in its header is no JSON object: save the LoRA again")
    return metadata


def _header_factor(path: Path, name: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """alpha / r of a peft file's own header; 1 where it says nothing, as diffusers takes it."""
    component, _, module = name.partition(".")
    alpha = metadata.get(f"{component}.lora_alpha")
    if alpha is None:
        return 1.0
    try:
        patterns = dict(metadata.get(f"{component}.alpha_pattern") or {})
        alpha = float(patterns.get(get_pattern_key(list(patterns), module), alpha))
    except (TypeError, ValueError, re.error) as error:
        reason = f"lora_alpha or alpha_pattern of {component} in its header is no number ({error})"
        raise ModelError(f"LoRA {path}: {reason}: save the LoRA again") from error
    return alpha / (math.sqrt(rank) if metadata.get(f"{component}.use_rslora") else rank)
