"""Add the adapters of a UNet, or LoRA files, to the weights they adapt."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2f_fast.errors import ModelError
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora.inject import ADAPTER, lora_layers
from d2f_fast.lora.key_names import module_names
from d2f_fast.lora.read import _HALVES, LORA_FILE, _delta, _metadata


@torch.no_grad()
def merged_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """State of the UNet as if it had no adapter, each adapted weight plus scale * B A, computed in float32."""
    layers = lora_layers(unet)
    merged = {}
    for key, value in unet.state_dict().items():
        if ".lora_" in key:
            continue
        name, _, leaf = key.rpartition(".base_layer.")
        if name in layers and leaf == "weight":
            value = (value.float() + layers[name].get_delta_weight(ADAPTER).float()).to(value.dtype)
        merged[f"{name}.{leaf}" if name in layers else key] = value
    return merged


def merged_unet(unet: Any) -> Any:
    """A new UNet on the CPU, without adapter, that computes what this one does; see `merged_state_dict`."""
    merged = type(unet).from_config(unet.config).type(unet.dtype)  # diffusers' `to` warns of a list that is empty
    merged.load_state_dict(merged_state_dict(unet))
    return merged.eval()


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
