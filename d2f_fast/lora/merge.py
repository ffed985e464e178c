"""Add the adapter of a UNet, or a LoRA file, to the weights that it adapts."""

import math
from typing import TypedDict

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from d2f_fast.errors import ModelError
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.hashes import file_sha256
from d2f_fast.lora.inject import ADAPTER, lora_layers
from d2f_fast.lora.key_names import AdaptableLayer
from d2f_fast.lora.match import match_layers
from d2f_fast.lora.read import LoraFile, read_lora


class MergedLora(TypedDict):
    """Description of a LoRA that was merged into a pipeline.

    Attributes:
        file: Name of the LoRA file.
        sha256: Hash of the file.
        scale: Factor on the whole adapter.
        layers: Number of layers that changed.
        change: Euclidean norm of the change, over all layers.
        relative_change: `change` divided by the norm of the weights that changed.
    """

    file: str
    sha256: str
    scale: float
    layers: int
    change: float
    relative_change: float


@torch.no_grad()
def merged_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """Return the state of a UNet with its adapter merged: W + scale * B A for each adapted weight.

    Args:
        unet: UNet with an adapter from `inject_lora`; it is not changed.

    Returns:
        Tensors under the keys of a UNet without adapter, in their own types; the sums are computed in float32.
    """
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


def merged_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a new UNet on the CPU, without adapter, that computes the same as a UNet with one.

    Args:
        unet: UNet with an adapter from `inject_lora`; it is not changed.
    """
    merged = type(unet).from_config(unet.config).type(unet.dtype)  # `to` of diffusers warns about an empty list
    merged.load_state_dict(merged_state_dict(unet))
    return merged.eval()


@torch.no_grad()
def fuse_adapter(pipeline: DiffusionPipeline, source: StrPath | LoraFile, scale: float) -> MergedLora:
    """Add a LoRA file to the weights of a pipeline's UNet and text encoders: W += scale * update.

    Args:
        pipeline: Pipeline in float32. No adapter is left in it, only the sums.
        source: `.safetensors` file in any form that `read` understands, a folder that holds one, or one that was read.
        scale: Factor on the whole adapter; for DoRA on the difference between the adapted weight and the weight.

    Raises:
        ModelError: The file is not a LoRA of this model, changes nothing, or is not finite; no weight was changed.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    lora = source if isinstance(source, LoraFile) else read_lora(source)
    modules = match_layers(lora, pipeline)
    # The updates are computed twice: those of SDXL, kept, would take as much memory as its weights.
    squares = {name: _delta(lora, name, modules[name]).square().sum().item() for name in lora.layers}
    change = math.sqrt(sum(squares.values())) * abs(scale)
    if not 0 < change < math.inf:
        problem = "holds numbers that are too large" if scale and change else "changes nothing"
        raise ModelError(f"LoRA {lora.path} {problem}: all of its updates add up to {change}")
    weights = math.sqrt(sum(modules[name].weight.square().sum().item() for name in lora.layers))
    for name, module in modules.items():
        module.weight += scale * _delta(lora, name, module)
    return {
        "file": lora.path.name,
        "sha256": file_sha256(lora.path),
        "scale": scale,
        "layers": len(modules),
        "change": change,
        "relative_change": change / weights,
    }


def _delta(lora: LoraFile, name: str, module: AdaptableLayer) -> Tensor:
    """Return the update of one layer in the shape of the module's weight."""
    return lora.layers[name].delta(module.weight).reshape(module.weight.shape)
