"""Write a LoRA file to share, and check that diffusers reads the same adapter from it."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from d2f_fast.errors import ModelError
from d2f_fast.files.atomic import StrPath, atomic_path, make_folder
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.lora.inject import ADAPTER, lora_layers
from d2f_fast.lora.read import ADAPTER_METADATA, LORA_FILE


@torch.no_grad()
def lora_state_dict(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a LoRA file: peft's keys, alpha = rank, and the scale folded into lora_B.

    Every version of diffusers reads such a file correctly, with or without its header.

    Args:
        unet: UNet with an adapter from `inject_lora`.
    """
    layers = lora_layers(unet)
    tensors = {}
    for key, value in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items():
        module, _, kind = key.partition(".lora_")
        scaling = layers[module].scaling[ADAPTER]
        folds = kind.startswith("B") and scaling != 1
        tensors[f"unet.{key}"] = (value * scaling if folds else value).clone()
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {name: r for name, r in ranks.items() if r != common}
    adapter = {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    header = json.dumps({f"unet.{key}": value for key, value in adapter.items()}, sort_keys=True)
    return tensors, {"format": "pt", ADAPTER_METADATA: header}


def save_lora(unet: UNet2DConditionModel, folder: StrPath, metadata: Mapping[str, str] | None = None) -> Path:
    """Write `pytorch_lora_weights.safetensors`, reload it through diffusers, and compare one forward pass.

    An error leaves the file that was there before.

    Args:
        unet: UNet with an adapter from `inject_lora`.
        folder: Folder of the file, made when missing.
        metadata: Further text entries of the header; None for none.

    Returns:
        The file.

    Raises:
        CheckpointError: A weight is not finite.
        RefusedInputError: The folder cannot be made, or the disk is full.
        ModelError: The reloaded file does not give the same output.
    """
    path = make_folder(folder) / LORA_FILE
    tensors, header = lora_state_dict(unet)
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, header | dict(metadata or {}))
        difference = reloaded_difference(unet, temporary)
        # Only rounding is allowed: 1e-6 in float32; a pipeline in half precision also rounds the adapter it loads.
        if not difference <= 8 * torch.finfo(unet.dtype).eps:
            raise ModelError(
                f"{path} does not reload to the same output (relative difference {difference:.1e}): not shareable"
            )
    return path


@torch.no_grad()
def reloaded_difference(unet: UNet2DConditionModel, path: StrPath) -> float:
    """Return the relative difference of one output between the adapter in memory and the one in a file.

    Args:
        unet: UNet with an adapter from `inject_lora`; it is left as it was.
        path: LoRA file, which diffusers loads as a second adapter.
    """
    tensors, header = read_tensors(path)
    was_training, trainable = unet.training, [p for p in unet.parameters() if p.requires_grad]
    unet.eval()
    metadata = json.loads(header[ADAPTER_METADATA])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a second adapter, which is intended here
        unet.load_lora_adapter(tensors, prefix="unet", adapter_name="reloaded", metadata=metadata)
    try:
        unet.set_adapter(ADAPTER)
        expected = _probe(unet)
        unet.set_adapter("reloaded")
        got = _probe(unet)
    finally:
        unet.set_adapter(ADAPTER)
        unet.delete_adapters("reloaded")
        unet.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)
    return float((got - expected).norm() / expected.norm())


def _probe(unet: UNet2DConditionModel) -> Tensor:
    """Return the output for one small, fixed, random input."""
    config, generator = unet.config, torch.Generator().manual_seed(0)
    side = 2 ** (len(config.block_out_channels) - 1) * 2

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    extra = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["added_cond_kwargs"] = {"text_embeds": random(1, pooled), "time_ids": random(1, 6).abs() * 512}
    sample = random(1, config.in_channels, side, side)
    condition = random(1, 8, config.cross_attention_dim)
    timestep = torch.tensor([math.pi * 100], device=unet.device)
    output: Tensor = unet(sample, timestep, encoder_hidden_states=condition, **extra, return_dict=False)[0]
    return output.float()
