"""Restate the tensors of a diffusers model in the original single-file layout, which ComfyUI, A1111 and Forge read.

    part            Stable Diffusion 1.x          Stable Diffusion 2.x       SDXL
    UNet            model.diffusion_model.        the same                   the same
    autoencoder     first_stage_model.            the same                   the same
    text encoder    cond_stage_model.transformer. cond_stage_model.model.    conditioner.embedders.0.transformer.
    second encoder  -                             -                          conditioner.embedders.1.model.

The prefix "…transformer." is followed by transformers' own names, "…model." by those of OpenCLIP, which keeps the
query, key and value of a layer in one tensor. Values that a program reads are never changed, only named and reshaped.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.tensor_stream import LazyTensor
from d2f_fast.lora.family import Family
from d2f_fast.lora.original_names import original_unet_name

Weights = Mapping[str, LazyTensor]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES: dict[Family, dict[str, str]] = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
# The empty tensors by which ComfyUI, Forge and the NoobAI models mark a v-prediction model and zero terminal SNR.
V_PREDICTION_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
# Stable Diffusion 2 computes with the last but one of OpenCLIP's 24 layers; diffusers leaves the last one out.
_SD2_LAYERS = 23
_OPEN_CLIP_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# The first names of the autoencoder's attention are those of older versions of diffusers.
_VAE_ATTENTION = {
    **{"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},
    **{"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
}
_VAE_RESIDUAL = {"conv_shortcut": "nin_shortcut"}


def original_tensors(
    family: Family,
    components: Mapping[str, Weights],
    configs: Mapping[str, Mapping[str, Any]],
    *,
    is_v_prediction: bool,
    zero_snr: bool,
) -> dict[str, LazyTensor]:
    """Return the tensors of a single file in the original layout.

    Args:
        family: Family of the model.
        components: Tensors of "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2", by their keys in
            diffusers. Keys of the text encoders begin with "text_model." or "text_projection.".
        configs: Configuration of "unet" and "vae" in diffusers.
        is_v_prediction: Whether the network predicts v, for which the marker "v_pred" is added.
        zero_snr: Whether the schedule ends at zero SNR, for which the marker "ztsnr" is added.

    Raises:
        ModelError: A component is missing, or holds a tensor that the original layout does not have.
    """
    missing = [name for name in ("unet", "vae", *TEXT_PREFIXES[family]) if name not in components]
    if missing:
        raise ModelError(f"the model has no {missing[0]}: a single file needs every part; give the whole pipeline")
    tensors = dict(_unet_tensors(components["unet"], configs["unet"]))
    tensors |= dict(_vae_tensors(components["vae"], configs["vae"]))
    for name, prefix in TEXT_PREFIXES[family].items():
        convert = _open_clip_tensors if prefix.endswith(".model.") else _clip_tensors
        tensors |= {prefix + key: tensor for key, tensor in convert(components[name])}
    markers = {V_PREDICTION_MARKER: is_v_prediction, ZERO_SNR_MARKER: zero_snr}
    return tensors | {name: LazyTensor.of(torch.empty(0)) for name, is_set in markers.items() if is_set}


def _unet_tensors(weights: Weights, config: Mapping[str, Any]) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the UNet's tensors in the original layout."""
    for key, tensor in weights.items():
        name, _, kind = key.rpartition(".")
        original = original_unet_name(name, config)
        if original is None:
            raise _unknown("unet", key)
        yield f"{UNET_PREFIX}{original}.{kind}", tensor


def _vae_tensors(weights: Weights, config: Mapping[str, Any]) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the autoencoder's tensors in the original layout."""
    for key, tensor in weights.items():
        name, _, kind = key.rpartition(".")
        original = _vae_name(name, len(config["up_block_types"]))
        if original is None:
            raise _unknown("vae", key)
        if kind == "weight" and re.search(r"attn_1\.(q|k|v|proj_out)$", original) and len(tensor.shape) == 2:
            tensor = tensor.map(_as_convolution, (*tensor.shape, 1, 1))
        yield f"{VAE_PREFIX}{original}.{kind}", tensor


def _vae_name(name: str, levels: int) -> str | None:
    """Return the name of an autoencoder's layer in the original code, or None for a layer that it does not have."""
    if name in ("quant_conv", "post_quant_conv"):
        return name
    found = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if found is None:
        return None
    half, rest = found[1], found[2]
    if rest in ("conv_in", "conv_out", "conv_norm_out"):
        return f"{half}.{'norm_out' if rest == 'conv_norm_out' else rest}"
    if middle := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        return f"{half}.mid.block_{int(middle[1]) + 1}.{_VAE_RESIDUAL.get(middle[2], middle[2])}"
    if middle := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        leaf = _VAE_ATTENTION.get(middle[1])
        return None if leaf is None else f"{half}.mid.attn_1.{leaf}"
    if sampler := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", rest):
        return f"{half}.{sampler[1]}.{_level(sampler, levels)}.{sampler[1]}sample.conv"
    if block := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest):
        leaf = _VAE_RESIDUAL.get(block[4], block[4])
        return f"{half}.{block[1]}.{_level(block, levels)}.block.{block[3]}.{leaf}"
    return None


def _level(found: re.Match[str], levels: int) -> int:
    """Return the number of a level in the original code, which counts the decoder's from the largest image on."""
    return int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])


def _clip_tensors(weights: Weights) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors of OpenAI's CLIP, whose names the original files share with transformers."""
    for key, tensor in weights.items():
        if not key.startswith("text_model."):
            raise _unknown("text_encoder", key)
        yield key, tensor
        if key == "text_model.embeddings.position_embedding.weight":
            length = tensor.shape[0]
            # Newer versions of transformers compute these numbers; the original files hold them.
            yield "text_model.embeddings.position_ids", LazyTensor.of(torch.arange(length).unsqueeze(0))


def _open_clip_tensors(weights: Weights) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors of a text encoder as OpenCLIP names them."""
    layers = {int(found[1]) for key in weights if (found := re.match(r"text_model\.encoder\.layers\.(\d+)\.", key))}
    for key, tensor in weights.items():
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in _OPEN_CLIP_NAMES:
            yield _OPEN_CLIP_NAMES[key], tensor
        elif key == "text_projection.weight":
            yield "text_projection", tensor.map(Tensor.t, tensor.shape[::-1])
        elif found and found[2] in _OPEN_CLIP_LAYERS:
            yield from _repeated(f"{_OPEN_CLIP_LAYERS[found[2]]}.{found[3]}", int(found[1]), tensor, layers)
        elif found and found[2] == "self_attn.q_proj":
            parts = [weights.get(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            name = f"attn.in_proj_{found[3]}"
            yield from _repeated(name, int(found[1]), _concatenated(key, parts), layers)
        elif not (found and found[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            raise _unknown("text encoder", key)
    embedding = weights["text_model.embeddings.token_embedding.weight"]
    # OpenCLIP's temperature, at the largest value that its training allows; no program that generates images reads it.
    yield "logit_scale", LazyTensor.of(torch.tensor(math.log(100), dtype=embedding.dtype))
    if "text_projection.weight" not in weights:
        yield "text_projection", LazyTensor.of(torch.eye(embedding.shape[1], dtype=embedding.dtype))


def _repeated(name: str, layer: int, tensor: LazyTensor, layers: set[int]) -> Iterator[tuple[str, LazyTensor]]:
    """Yield a tensor of one layer; that of the last layer of Stable Diffusion 2 also as the layer that it lacks.

    OpenCLIP has one layer more, and readers that check for every key would refuse a file without it. None of the
    programs computes it.
    """
    yield f"transformer.resblocks.{layer}.{name}", tensor
    if layers == set(range(_SD2_LAYERS)) and layer == _SD2_LAYERS - 1:
        yield f"transformer.resblocks.{_SD2_LAYERS}.{name}", tensor


def _concatenated(key: str, parts: list[LazyTensor | None]) -> LazyTensor:
    """Return the query, key and value of a layer as one tensor."""
    present = [part for part in parts if part is not None]
    if len(present) < 3:
        raise ModelError(f"{printable(key)} has no key or value beside it: the text encoder is incomplete")
    shape = (sum(part.shape[0] for part in present), *present[0].shape[1:])
    return LazyTensor(shape, present[0].dtype, lambda: torch.cat([part.load() for part in present]))


def _as_convolution(weight: Tensor) -> Tensor:
    """Return the matrix of a linear layer as the kernel of a 1×1 convolution."""
    return weight[:, :, None, None]


def _unknown(component: str, key: str) -> ModelError:
    """Return the error for a tensor that the original layout has no name for."""
    return ModelError(
        f"{component}: {printable(key)} has no name in the original layout of Stable Diffusion: keep this model as a"
        " diffusers folder"
    )
