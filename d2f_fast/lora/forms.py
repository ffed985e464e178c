"""Convert LoRA files between the forms of peft and kohya. The layers have one name each in between:

unet.<module>    text_encoder.text_model.<module>    text_encoder_2.text_model.<module>        as in diffusers
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from d2f_fast.files.tensor_stream import LazyTensor, write_tensor_stream
from d2f_fast.lora.family import unknown_family
from d2f_fast.lora.fit import check_named_as_in_diffusers, check_plain_layers, known_layers
from d2f_fast.lora.key_names import layers_of
from d2f_fast.lora.kohya import kohya_header, kohya_state_dict
from d2f_fast.lora.layer_weights import LoraLayerWeights
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


class Networks(Protocol):
    """The networks whose layers a LoRA names; a pipeline has them, too."""

    @property
    def unet(self) -> UNet2DConditionModel: ...
    @property
    def text_encoder(self) -> nn.Module: ...
    @property
    def text_encoder_2(self) -> nn.Module | None: ...


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
    check_plain_layers(lora.about)
    if networks is None:
        check_named_as_in_diffusers(lora.about)
        names = {name: name for name in lora.layers}
    else:
        names = known_layers(lora.about, layers_of(networks))
    return {_with_text_model(known): folded(lora.layers[name].as_lora()) for name, known in names.items()}


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
