"""LoRA adapters of a UNet: where they go, and the file they are shared in. peft injects and owns the parameters."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from d2f_fast.training.checkpoint import atomic_path, make_folder, read_metadata, read_tensors, write_tensors
from d2f_fast.errors import ModelError

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"
LINEAR_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
)
CONVOLUTION_TARGETS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
# Ranks at which LoRA on the first and last convolution is as expressive as their full weights: in * 9 and out.
FIRST_LAYER, LAST_LAYER = "conv_in", "conv_out"


def inject_lora(
    unet: Any,
    rank: int,
    *,
    alpha: float | None = None,
    conv_rank: int = 0,
    first_last_layers: bool = False,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, nn.Parameter]:
    """Freeze a diffusers UNet and add float32 LoRA layers to it; the output does not change (B is zero).

    Args:
        unet: UNet2DConditionModel; its configuration and keys stay.
        rank: of the linear layers, 1 or more.
        alpha: the scale is alpha / rank, the same for every layer; None means rank, a scale of 1.
        conv_rank: of the residual blocks' and samplers' convolutions; 0 leaves them out.
        first_last_layers: adapt conv_in and conv_out too, at the rank that makes them as expressive as full weights.
        target_modules: module name endings in place of the attention and feed-forward layers.
        seed: of the initial A.

    Returns:
        The trainable parameters by name.

    Raises:
        ModelError: no module of the UNet has such a name, or a rank is below 1.
    """
    if rank < 1 or conv_rank < 0:
        raise ModelError(f"rank must be at least 1 and conv_rank at least 0, got {rank} and {conv_rank}")
    targets = list(LINEAR_TARGETS if target_modules is None else target_modules)
    for target in target_modules or ():  # peft passes over the ones that match nothing
        matched = [module for name, module in unet.named_modules() if f".{name}".endswith(f".{target}")]
        if not matched or not all(isinstance(module, nn.Linear | nn.Conv2d) for module in matched):
            raise ModelError(f"target_modules: {target!r} is no linear or convolution layer of the UNet; see its keys")
    ranks: dict[str, int] = {}
    if conv_rank:
        ranks |= dict.fromkeys(CONVOLUTION_TARGETS, conv_rank)
    if first_last_layers:
        ranks |= {
            FIRST_LAYER: unet.conv_in.in_channels * math.prod(unet.conv_in.kernel_size),
            LAST_LAYER: unet.conv_out.out_channels,
        }
    scale = 1.0 if alpha is None else alpha / rank
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=[*targets, *ranks],
        rank_pattern=ranks,
        alpha_pattern={name: scale * r for name, r in ranks.items()},
    )
    unet.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ModelError(f"the UNet takes no LoRA on {targets}: {error}") from error
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """The adapted modules by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def lora_state_dict(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the shareable file: peft keys, the scale folded into lora_B, alpha = rank.

    Such a file is right with or without its metadata, in any version of diffusers.
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
    return tensors, {"format": "pt", "lora_adapter_metadata": header}


def save_lora(unet: Any, folder: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write `pytorch_lora_weights.safetensors`, reload it through diffusers, and compare one forward.

    Args:
        unet: with an adapter from `inject_lora`.
        folder: made when missing.
        metadata: further header entries.

    Raises:
        CheckpointError: a weight is not finite.
        RefusedInputError: the disk is full.
        ModelError: the reloaded file does not give the same output.

    An error leaves what was there before.
    """
    path = make_folder(folder) / LORA_FILE
    tensors, header = lora_state_dict(unet)
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, header | dict(metadata or {}))
        difference = reloaded_difference(unet, temporary)
        # Nothing but rounding: 1e-6 in float32; a pipeline in half precision also rounds the adapter that it loads.
        if not difference <= 8 * torch.finfo(unet.dtype).eps:
            raise ModelError(
                f"{path} does not reload to the same output (relative difference {difference:.1e}): not shareable"
            )
    return path


def lora_tags(source: str | Path) -> dict[str, str]:
    """What a LoRA file, or the folder that holds one, says of itself: header entries that begin with "d2f."."""
    path = Path(source)
    header = read_metadata(path / LORA_FILE if path.is_dir() else path)
    return {name: value for name, value in header.items() if name.startswith("d2f.")}


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
def reloaded_difference(unet: Any, path: str | Path) -> float:
    """Relative difference of one forward between the adapter in memory and the one that diffusers loads from a file."""
    tensors, header = read_tensors(path)
    was_training, trainable = unet.training, [p for p in unet.parameters() if p.requires_grad]
    unet.eval()
    metadata = json.loads(header["lora_adapter_metadata"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of the second adapter, which is the point
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
    return ((got - expected).norm() / expected.norm()).item()


def _probe(unet: Any) -> Tensor:
    """Output for one fixed random input of small size."""
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
    return unet(sample, timestep, encoder_hidden_states=condition, **extra, return_dict=False)[0].float()
