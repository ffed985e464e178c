"""Start the LoRA layers of a UNet from a LoRA file of any form, whose effect they then have before the first step.

The part of the file that adapts text encoders is not trained. It is merged into them, and kept, so that it is written
again with the trained part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.hashes import file_sha256
from d2f_fast.lora.fit import starting_layers
from d2f_fast.lora.inject import ADAPTER, add_adapter, lora_layers
from d2f_fast.lora.key_names import adaptable_layers, layers_of
from d2f_fast.lora.layer_weights import LoraLayerWeights
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.source import lora_identity, parse_lora
from d2f_fast.lora.tags import check_tags, lora_tags


@dataclass(frozen=True)
class StartingLora:
    """LoRA file that a run starts from.

    Attributes:
        path: The file.
        scale: Factor on the whole adapter; 1 applies it as it was trained.
        sha256: Hash of the file.
        unet_layers: Update of each layer of the UNet, by its name in diffusers, with every scale folded into `up`.
        text_layers: The same for "text_encoder.<module>" and "text_encoder_2.<module>".
        tags: Header entries of the file that begin with "d2f.".
    """

    path: Path
    scale: float
    sha256: str
    unet_layers: dict[str, LoraLayerWeights]
    text_layers: dict[str, LoraLayerWeights]
    tags: dict[str, str]

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank of each layer of the UNet."""
        return {name: layer.rank for name, layer in self.unet_layers.items()}

    @property
    def identity(self) -> str:
        """Return a short text that differs for another content or scale."""
        return lora_identity(self.sha256, self.scale)


def read_start(entry: str, pipeline: DiffusionPipeline) -> StartingLora:
    """Read the LoRA file that a run starts from, for the pipeline that is trained.

    Args:
        entry: `PATH` or `PATH:SCALE` of the file, or of a folder that holds one.
        pipeline: Pipeline without an adapter.

    Raises:
        ModelError: The file is not a LoRA of this model, has no layer of the UNet, or is a DoRA.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    source = parse_lora(entry)
    lora = read_lora(source.path)
    names = starting_layers(lora.about, layers_of(pipeline))
    modules = adaptable_layers(pipeline)
    unet_layers: dict[str, LoraLayerWeights] = {}
    text_layers: dict[str, LoraLayerWeights] = {}
    for name, canonical in names.items():
        folded = _folded(lora.layers[name].as_lora(), source.scale, modules[canonical].weight.shape)
        if not (folded.down.norm() * folded.up.norm()).isfinite():
            raise ModelError(
                f"LoRA {printable(lora.path)}: {lora.about.layers[name].stem} holds numbers that are too large: take"
                " an earlier save of the LoRA"
            )
        if canonical.startswith("unet."):
            unet_layers[canonical.removeprefix("unet.")] = folded
        else:
            text_layers[canonical] = folded
    tags = lora_tags(source.path)
    check_tags(f"LoRA {lora.path}", tags, shift=1.0)  # Its shift is not used.
    return StartingLora(lora.path, source.scale, file_sha256(lora.path), unet_layers, text_layers, tags)


@torch.no_grad()
def inject_start(
    unet: UNet2DConditionModel, start: StartingLora, *, alpha: float | None = None, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Freeze a UNet and add float32 LoRA layers to it that have the ranks and the effect of a LoRA file.

    Args:
        unet: Network to adapt, in place.
        start: LoRA that is started from.
        alpha: The layers are scaled by alpha / r in training, where r is the most frequent rank; None is a scale of 1.
            It does not change the effect.
        seed: Seed of random numbers, of which none remains.

    Returns:
        The trainable parameters by name.
    """
    ranks = start.ranks
    common = mode(ranks.values())
    scale = 1.0 if alpha is None else alpha / common
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=scale * common,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern={name: scale * rank for name, rank in others.items()},
    )
    trainable = add_adapter(unet, config, seed)
    for name, module in lora_layers(unet).items():
        layer = start.unet_layers[name]
        down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        down.copy_(layer.down.reshape(down.shape))
        up.copy_(layer.up.reshape(up.shape) / scale)
    return trainable


@torch.no_grad()
def merge_text_layers(pipeline: DiffusionPipeline, start: StartingLora) -> None:
    """Add the part of a LoRA that adapts text encoders to their weights, in place.

    Args:
        pipeline: Pipeline for which the LoRA was read.
        start: LoRA that is started from.
    """
    modules = adaptable_layers(pipeline)
    for name, layer in start.text_layers.items():
        weight = modules[name].weight
        delta = layer.delta(weight.cpu()).reshape(weight.shape)
        weight.copy_(weight.float() + delta.to(weight.device))


def _folded(layer: LoraLayerWeights, scale: float, shape: Sequence[int]) -> LoraLayerWeights:
    """Return an update with its scale folded into `up`, and `down` in the shape of the weight's inputs."""
    down = layer.down.reshape(layer.rank, *shape[1:])
    up = (layer.up * (layer.alpha / layer.rank * scale)).reshape(-1, layer.rank, *(1 for _ in shape[2:]))
    return LoraLayerWeights(down, up, float(layer.rank))
