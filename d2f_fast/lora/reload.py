"""Read a written LoRA file back, and compare the output with that of the adapter in memory."""

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora.family import family_of
from d2f_fast.lora.fit import KOHYA_PREFIX
from d2f_fast.lora.float32_weights import computing_in_float32, float32_stand_ins
from d2f_fast.lora.inject import ADAPTER, lora_layers
from d2f_fast.lora.key_names import text_module, unet_layer_names
from d2f_fast.lora.layer_weights import LoraLayerWeights
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.scales import ADAPTER_METADATA
from d2f_fast.lora.targets import CONVOLUTION_TARGETS, FIRST_LAYER, LAST_LAYER

_RELOADED = "reloaded"
_LAYERS_WITH_THEIR_OWN_RANK = tuple(f".{name}" for name in (*CONVOLUTION_TARGETS, FIRST_LAYER, LAST_LAYER))


def check_peft_file(unet: UNet2DConditionModel, path: StrPath) -> None:
    """Refuse a file with peft's keys that diffusers does not load to the output of the adapter in memory.

    Args:
        unet: UNet with an adapter from `inject_lora`; it is left as it was.
        path: File to check.

    Raises:
        ModelError: The output differs by more than rounding.
    """
    tensors, header = read_tensors(path)
    tensors = {key: value for key, value in tensors.items() if key.startswith("unet.")}
    metadata = {key: value for key, value in json.loads(header[ADAPTER_METADATA]).items() if key.startswith("unet.")}
    _refuse_difference(unet, path, reloaded_difference(unet, tensors, metadata=metadata))


def check_kohya_file(unet: UNet2DConditionModel, path: StrPath) -> None:
    """Refuse a kohya file that is not read back to the output of the adapter in memory.

    This package must find every layer in the file. The output is that of diffusers' own reading of the file for the
    families that it knows, unless it leaves layers out, and otherwise that of this package's reading.

    Args:
        unet: UNet with an adapter from `inject_lora`; it is left as it was.
        path: File to check.

    Raises:
        ModelError: A layer is missing, or the output differs by more than rounding.
    """
    layers = read_lora(path).layers
    ours: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in lora_layers(unet):
        found = next((layers[other].as_lora() for other in unet_layer_names(name, unet) if other in layers), None)
        if found is None:
            raise ModelError(f"{path} lacks the layer {name}: not shareable")
        ranks[name] = found.rank
        ours[f"unet.{name}.lora_A.weight"] = found.down
        ours[f"unet.{name}.lora_B.weight"] = found.up * (found.alpha / found.rank)
    options: dict[str, Any] = {"metadata": uniform_scale_metadata(ranks)}
    read = ours
    if family_of(unet) is not None:
        tensors, _ = read_tensors(path)
        tensors = {key: value for key, value in tensors.items() if key.startswith(KOHYA_PREFIX)}
        theirs, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=unet.config)
        if convert_unet_state_dict_to_peft(theirs).keys() == ours.keys():
            read, options = theirs, {"network_alphas": alphas}
    _refuse_difference(unet, path, reloaded_difference(unet, read, **options))


def check_text_layers(path: StrPath, layers: Mapping[str, LoraLayerWeights]) -> None:
    """Refuse a file of which other updates of the text encoders are read than were written.

    Args:
        path: File to check.
        layers: Updates by their names "text_encoder.<module>" and "text_encoder_2.<module>".

    Raises:
        ModelError: A layer is missing or differs.
    """
    found = read_lora(path).layers
    for name, layer in layers.items():
        component, _, module = name.partition(".")
        kohya = text_module(module).replace(".", "_")
        prefixes = ("te_", "te1_") if component == "text_encoder" else ("te2_",)
        names = (f"{component}.{text_module(module)}", *(f"lora_{prefix}{kohya}" for prefix in prefixes))
        read = next((found[spelled].as_lora() for spelled in names if spelled in found), None)
        pairs = () if read is None else ((read.down, layer.down), (read.up, layer.up))
        if read is None or read.alpha != read.rank or not all(torch.equal(a, b) for a, b in pairs):
            raise ModelError(f"{path} does not hold {name} as it was written: not shareable")


def uniform_scale_metadata(ranks: Mapping[str, int], component: str = "unet") -> dict[str, Any]:
    """Return peft's configuration of an adapter whose layers all have alpha = rank, a scale of 1.

    The patterns name the convolutions that have a rank of their own even where it equals that of the other layers:
    peft swaps one adapter for another in place (hot-swapping) only where both have the same `alpha_pattern`, so that of
    a file must not depend on the rank of the other layers.

    Args:
        ranks: Rank of each adapted layer.
        component: Component of the pipeline that the layers belong to.
    """
    own = {name for name in ranks if f".{name}".endswith(_LAYERS_WITH_THEIR_OWN_RANK)}
    others = [rank for name, rank in ranks.items() if name not in own] or list(ranks.values())
    common = max(others, key=others.count)
    pattern = {name: rank for name, rank in ranks.items() if rank != common or name in own}
    adapter = {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    return {f"{component}.{key}": value for key, value in adapter.items()}


@torch.no_grad()
def reloaded_difference(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], **options: Any) -> float:
    """Return the relative difference of one output between the adapter in memory and one that was read back.

    Args:
        unet: UNet with an adapter from `inject_lora`; it is left as it was.
        tensors: Tensors with the prefix "unet.", which diffusers loads as a second adapter.
        options: What diffusers needs beside them, `metadata` or `network_alphas`.

    Returns:
        Norm of the difference divided by the norm of the output; infinity where layers were left out.
    """
    was_training, trainable = unet.training, [p for p in unet.parameters() if p.requires_grad]
    unet.eval()
    with float32_stand_ins(unet), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a second adapter, which is intended here
        unet.load_lora_adapter(dict(tensors), prefix="unet", adapter_name=_RELOADED, **options)
    try:
        is_complete = all(_RELOADED in layer.lora_A for layer in lora_layers(unet).values())
        with computing_in_float32(unet):
            unet.set_adapter(ADAPTER)
            expected = _probe(unet)
            unet.set_adapter(_RELOADED)
            got = _probe(unet)
    finally:
        unet.set_adapter(ADAPTER)
        unet.delete_adapters(_RELOADED)
        unet.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)
    return float((got - expected).norm() / expected.norm()) if is_complete else math.inf


def _refuse_difference(unet: UNet2DConditionModel, path: StrPath, difference: float) -> None:
    """Refuse a difference that rounding does not explain."""
    if not difference <= 8 * torch.finfo(torch.float32).eps:  # Only rounding is allowed: 1e-6.
        raise ModelError(
            f"{path} does not reload to the same output (relative difference {difference:.1e}): not shareable"
        )


def _probe(unet: UNet2DConditionModel) -> Tensor:
    """Return the output for one small, fixed, random input in float32."""
    config, generator = unet.config, torch.Generator().manual_seed(0)
    side = 2 ** (len(config.block_out_channels) - 1) * 2

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device)

    extra = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["added_cond_kwargs"] = {"text_embeds": random(1, pooled), "time_ids": random(1, 6).abs() * 512}
    sample = random(1, config.in_channels, side, side)
    condition = random(1, 8, config.cross_attention_dim)
    timestep = torch.tensor([math.pi * 100], device=unet.device)
    output: Tensor = unet(sample, timestep, encoder_hidden_states=condition, **extra, return_dict=False)[0]
    return output
