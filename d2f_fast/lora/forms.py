"""Convert LoRA files between the forms of peft and kohya. The layers have one name each in between:

unet.<module>    text_encoder.text_model.<module>    text_encoder_2.text_model.<module>        as in diffusers
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.tensor_stream import LazyTensor, write_tensor_stream
from d2f_fast.lora.family import Family, family_of_text_width, unknown_family
from d2f_fast.lora.file_keys import component_of
from d2f_fast.lora.key_names import module_names
from d2f_fast.lora.kohya import kohya_header, kohya_state_dict
from d2f_fast.lora.layer_weights import LayerWeights, LoraLayerWeights
from d2f_fast.lora.match import canonical_names
from d2f_fast.lora.read import LoraFile
from d2f_fast.lora.reload import uniform_scale_metadata
from d2f_fast.lora.resize import Layers, folded
from d2f_fast.lora.scales import ADAPTER_METADATA

LoraForm = Literal["peft", "kohya"]
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# Entries of a header that go with a LoRA from form to form: how it is sampled, and what its author says of it.
_KEPT = ("d2f.", "ss_", "modelspec.")
# Entries that describe the matrices of one file, and are written anew or not at all.
_OF_ONE_FILE = {
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "modelspec.hash_sha256"),
}
_FAMILY_OF_VERSION: dict[str, Family] = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_": "sdxl"}


class Networks(Protocol):
    """The networks whose layers a LoRA names; a pipeline has them, too."""

    @property
    def unet(self) -> UNet2DConditionModel: ...
    @property
    def text_encoder(self) -> nn.Module: ...
    @property
    def text_encoder_2(self) -> nn.Module | None: ...


def family_of_lora(lora: LoraFile) -> Family | None:
    """Return the family of the model that a LoRA was trained for, or None where the file does not show it.

    Args:
        lora: LoRA file. The width of the text that its layers take decides, and its header where it has none of them.
    """
    for name, layer in lora.layers.items():
        if re.search(r"attn2[._]to_[kv]$", name) and component_of(name) == "unet":
            return family_of_text_width(layer.shape[1])
    version = lora.header.get("ss_base_model_version", "")
    return next((family for start, family in _FAMILY_OF_VERSION.items() if version.startswith(start)), None)


def kept_entries(header: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a LoRA file's header that hold in every form of the LoRA.

    Args:
        header: Text entries of the header.
    """
    return {name: value for name, value in header.items() if name.startswith(_KEPT) and name not in _OF_ONE_FILE}


def layers_by_name(lora: LoraFile, networks: Networks | None) -> dict[str, LoraLayerWeights]:
    """Return the updates of a LoRA file by the names of this module, with their scales folded in.

    Args:
        lora: LoRA file in any form that `read_lora` knows.
        networks: Networks of the model. None is enough for files whose names are those of diffusers.

    Raises:
        ModelError: A layer is not one of the model's, occurs twice, or is DoRA; or the model is needed and not known.
    """
    if networks is None:
        foreign = [name for name in lora.layers if not name.startswith(("unet.", *(f"{e}." for e in _TEXT_ENCODERS)))]
        if foreign:
            raise ModelError(
                f"LoRA {printable(lora.path)}: its layers, such as {printable(foreign[0])}, do not show which model"
                " they are of: give its folder as --base_model"
            )
        return {_with_text_model(name): _as_lora(lora, name, layer) for name, layer in lora.layers.items()}
    modules, names = module_names(networks), canonical_names(networks)
    layers: dict[str, LoraLayerWeights] = {}
    for name, layer in lora.layers.items():
        if name not in modules:
            raise ModelError(
                f"LoRA {printable(lora.path)}: {printable(name)} is no layer of this model: give the folder of the"
                " model that the LoRA was trained for as --base_model"
            )
        known = _with_text_model(names[id(modules[name])])
        if known in layers:
            raise ModelError(f"LoRA {printable(lora.path)}: {known} is adapted twice, under two names: it is damaged")
        layers[known] = _as_lora(lora, name, layer)
    return layers


def write_lora_form(
    path: Path,
    layers: Layers,
    form: LoraForm,
    networks: Networks | None,
    *,
    title: str,
    prediction_type: str = "epsilon",
    tags: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write updates as one LoRA file, whole or not at all. The same arguments give the same bytes.

    Args:
        path: File to write or replace.
        layers: Updates by the names of this module.
        form: Form of the file.
        networks: Networks of the model; only the form "peft" can be written without them.
        title: Name of the LoRA in kohya's header.
        prediction_type: What the model predicts, for kohya's header.
        tags: Further entries of the header, which replace those that the form has; None for none.
        dtype: Type of the matrices.

    Raises:
        ModelError: The form is "kohya", and the networks are not known.
        CheckpointError: A matrix is not finite, or too large for the type; nothing is written.
        RefusedInputError: The disk is full.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = layer.down, folded(layer).up
    entries = {"format": "pt"}
    if form == "kohya":
        if networks is None:
            raise unknown_family(path)
        entries |= kohya_header(networks.unet, tensors, title, prediction_type)
        tensors = kohya_state_dict(networks.unet, tensors)
    else:
        entries[ADAPTER_METADATA] = json.dumps(_peft_metadata(layers), sort_keys=True)
    lazy = {
        # Programs read alpha as a number, whose type does not matter: float32 holds every rank.
        key: LazyTensor.of(tensor) if key.endswith(".alpha") else LazyTensor.of(tensor).to(dtype)
        for key, tensor in tensors.items()
    }
    write_tensor_stream(path, lazy, entries | dict(tags or {}))


def _as_lora(lora: LoraFile, name: str, layer: LayerWeights) -> LoraLayerWeights:
    """Return an update as two matrices with the scale folded in, or refuse DoRA, which depends on the weight."""
    found = layer.as_lora()
    if found.magnitude is not None:
        raise ModelError(
            f"LoRA {printable(lora.path)}: {printable(name)} is DoRA, whose update depends on the model's weights:"
            " merge it into the model, with --lora"
        )
    return folded(found)


def _peft_metadata(layers: Layers) -> dict[str, object]:
    """Return peft's configuration of each component, in which every scale is 1."""
    metadata: dict[str, object] = {}
    for component in ("unet", *_TEXT_ENCODERS):
        start = f"{component}."
        ranks = {name.removeprefix(start): layer.rank for name, layer in layers.items() if name.startswith(start)}
        if ranks:
            described = uniform_scale_metadata(ranks)
            metadata |= {f"{component}.{key.removeprefix('unet.')}": value for key, value in described.items()}
    return metadata


def _with_text_model(name: str) -> str:
    """Return a layer's name with the "text_model." that newer versions of transformers leave out."""
    component, _, rest = name.partition(".")
    if component in _TEXT_ENCODERS and not rest.startswith("text_model."):
        return f"{component}.text_model.{rest}"
    return name
