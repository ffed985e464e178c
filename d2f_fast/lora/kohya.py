"""Write an adapter in the form of kohya's scripts, which ComfyUI, A1111 and Forge read completely.

    lora_unet_<layer>.lora_down.weight    A
    lora_unet_<layer>.lora_up.weight      B, with the scale folded in
    lora_unet_<layer>.alpha               rank of the layer, so that alpha / rank is 1
    lora_te_text_model_<layer>…           of the text encoder; lora_te1_ and lora_te2_ for those of SDXL

The layers of Stable Diffusion 1.x and 2.x have their diffusers names, those of SDXL the names of Stability's own code
(sgm). With the other choice some of these programs lose layers, without an error.
"""

import json
from collections.abc import Iterable, Mapping
from statistics import mode

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from d2f_fast.lora.family import Family, family_of, has_sizes_condition
from d2f_fast.lora.fit import KOHYA_PREFIX
from d2f_fast.lora.key_names import sgm_name, text_module
from d2f_fast.lora.targets import FIRST_LAYER, LAST_LAYER

# What the programs call each family, from which A1111 and Forge decide whether a file fits the loaded model.
_KOHYA_VERSIONS: dict[Family, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES: dict[Family, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.")
_PREDICTION_TYPES = {"v_prediction": "v"}  # the other types have diffusers' names
STABILITY = "https://github.com/Stability-AI/generative-models"


def architecture(family: Family, is_v_prediction: bool) -> str:
    """Return what the entry "modelspec.architecture" says of a base model.

    Args:
        family: Family of the model.
        is_v_prediction: Whether the network predicts v.
    """
    return "stable-diffusion-v2-768-v" if family == "sd2" and is_v_prediction else _ARCHITECTURES[family]


def prediction_name(prediction_type: str) -> str:
    """Return what the entry "modelspec.prediction_type" says.

    Args:
        prediction_type: What the network predicts, as in diffusers.
    """
    return _PREDICTION_TYPES.get(prediction_type, prediction_type)


def kohya_layer_names(unet: UNet2DConditionModel, layers: Iterable[str]) -> dict[str, str]:
    """Return the name of each layer in a kohya file.

    Args:
        unet: UNet with the layers.
        layers: Names of adapted layers: of the UNet as in diffusers, of the text encoders as "text_encoder.<module>"
            and "text_encoder_2.<module>".
    """
    text = {name: _text_name(name, has_sizes_condition(unet)) for name in layers if name.startswith(_TEXT_PREFIXES)}
    names = {name: name.replace(".", "_") for name in layers if name not in text}
    if has_sizes_condition(unet):
        sgm = {name: sgm_name(name, unet) for name in names}
        # Names of both kinds in one file would make diffusers drop one of them.
        if None not in sgm.values():
            names = {name: str(found) for name, found in sgm.items()}
    return {name: f"{KOHYA_PREFIX}{found}" for name, found in names.items()} | text


def _text_name(name: str, is_sdxl: bool) -> str:
    """Return the name of a layer of a text encoder in a kohya file."""
    component, _, module = name.partition(".")
    number = ("1" if component == "text_encoder" else "2") if is_sdxl else ""
    return f"lora_te{number}_{text_module(module).replace('.', '_')}"


def kohya_state_dict(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a kohya file.

    Args:
        unet: UNet with the adapter.
        tensors: Tensors of `lora_state_dict`, whose scale is folded into B.
    """
    layers = _matrices(tensors)
    names = kohya_layer_names(unet, layers)
    kohya = {}
    for name, (down, up) in layers.items():
        kohya[f"{names[name]}.lora_down.weight"] = down
        kohya[f"{names[name]}.lora_up.weight"] = up
        kohya[f"{names[name]}.alpha"] = torch.tensor(float(down.shape[0]))
    return kohya


def kohya_header(
    unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], title: str, prediction_type: str
) -> dict[str, str]:
    """Return the header entries by which other programs recognise the base model and the adapter. There is no date.

    Args:
        unet: UNet with the adapter. For a network of no known family the entries that name the family are left out.
        tensors: Tensors of `lora_state_dict`.
        title: Name that the programs show.
        prediction_type: What the network predicts, as in diffusers.
    """
    ranks: list[int] = []
    kernel_ranks: list[int] = []
    for name, (down, _) in _matrices(tensors).items():
        if name not in (FIRST_LAYER, LAST_LAYER) and not name.startswith(_TEXT_PREFIXES):
            (kernel_ranks if down.shape[2:].numel() > 1 else ranks).append(down.shape[0])
    rank = mode(ranks or kernel_ranks or [down.shape[0] for down, _ in _matrices(tensors).values()])
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.prediction_type": prediction_name(prediction_type),
    }
    if kernel_ranks:
        conv_rank = str(mode(kernel_ranks))
        header["ss_network_args"] = json.dumps({"conv_dim": conv_rank, "conv_alpha": conv_rank})
    family = family_of(unet)
    return header if family is None else header | _family_entries(family, prediction_type == "v_prediction")


def _family_entries(family: Family, is_v_prediction: bool) -> dict[str, str]:
    """Return the header entries that name the family of the base model."""
    version = "sd_v2_v" if family == "sd2" and is_v_prediction else _KOHYA_VERSIONS[family]
    is_sdxl = family == "sdxl"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(family == "sd2"),
        "modelspec.architecture": f"{architecture(family, is_v_prediction)}/lora",
        "modelspec.implementation": STABILITY if is_sdxl else "diffusers",
    }


def _matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer from tensors with peft's keys: those of the UNet by their name in diffusers."""
    down = {key.removesuffix(".lora_A.weight"): value for key, value in tensors.items() if ".lora_A." in key}
    return {name.removeprefix("unet."): (a, tensors[f"{name}.lora_B.weight"]) for name, a in down.items()}
