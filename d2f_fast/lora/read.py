"""Read LoRA files into the two matrices and the alpha of each adapted layer.

A layer's update is alpha / r * up @ down. These key forms are understood:

    peft        unet.<module>.lora_A.weight          scale in the header, or folded into lora_B
    diffusers   unet.<module>.lora.down.weight       the older form
    kohya       lora_unet_<module>.lora_down.weight  alpha for each layer; also lora_te_, lora_te1_ and lora_te2_

The layers keep the file's own names: `key_names` maps them to a pipeline's modules.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peft.utils.other import get_pattern_key
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.tensor_file import read_metadata, read_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_ENDING = "_kohya.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"
TAG_PREFIX = "d2f."

_Part = Literal["down", "up", "alpha"]
_PART_OF_SUFFIX: dict[str, _Part] = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora.down.weight": "down",
    ".lora_down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora.up.weight": "up",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}


@dataclass(frozen=True)
class LoraLayerWeights:
    """Update of one layer: alpha / r * up @ down.

    Attributes:
        down: First matrix, [r, in] or, for a convolution, [r, in, kernel height, kernel width], float32.
        up: Second matrix, [out, r] or [out, r, 1, 1], float32.
        alpha: Number that scales the update; r is a scale of 1.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Return the rank r of the update."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return the update as a matrix, [out, in * kernel height * kernel width], float32."""
        return (self.up.flatten(1) @ self.down.flatten(1)) * (self.alpha / self.rank)


@dataclass(frozen=True)
class LoraFile:
    """Content of a LoRA file.

    Attributes:
        path: The file.
        layers: Update of each adapted layer, by the file's own name of the layer.
        header: Text entries of the file's header.
    """

    path: Path
    layers: dict[str, LoraLayerWeights]
    header: dict[str, str]


def lora_path(source: StrPath) -> Path:
    """Return the path of a LoRA file.

    Args:
        source: The file itself, or the folder that holds `pytorch_lora_weights.safetensors` or, without that one, a
            single file whose name ends in "_kohya.safetensors".
    """
    path = Path(source)
    if not path.is_dir():
        return path
    if not (path / LORA_FILE).exists() and len(found := list(path.glob(f"*{KOHYA_ENDING}"))) == 1:
        return found[0]
    return path / LORA_FILE


def read_lora(source: StrPath) -> LoraFile:
    """Read a LoRA file.

    Args:
        source: `.safetensors` file, or a folder that holds one; see `lora_path`.

    Raises:
        ModelError: The file holds another kind of adapter, lacks a matrix, or its header gives no usable scale.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    path = lora_path(source)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is not safetensors, other formats can run code: convert it to safetensors first")
    tensors, header = read_tensors(path)
    parts = _group_by_layer(path, tensors)
    metadata = _adapter_metadata(path, header)
    layers = {name: _layer_weights(path, name, found, metadata) for name, found in parts.items()}
    return LoraFile(path, layers, header)


def lora_tags(source: StrPath) -> dict[str, str]:
    """Read the header entries of a LoRA file that begin with "d2f.": how it was trained and is to be sampled.

    Args:
        source: `.safetensors` file, or a folder that holds one; see `lora_path`.

    Raises:
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    header = read_metadata(lora_path(source))
    return {name: value for name, value in header.items() if name.startswith(TAG_PREFIX)}


def _group_by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[_Part, Tensor]]:
    """Return the tensors of each layer, or refuse a file that holds anything else."""
    layers: dict[str, dict[_Part, Tensor]] = {}
    foreign = []
    for key, value in tensors.items():
        suffix = next((suffix for suffix in _PART_OF_SUFFIX if key.endswith(suffix)), None)
        if suffix is None:
            foreign.append(key)
        else:
            layers.setdefault(key.removesuffix(suffix), {})[_PART_OF_SUFFIX[suffix]] = value
    if foreign:
        raise ModelError(
            f"LoRA {path}: {foreign[0]} is not a LoRA weight: only LoRA files of peft and kohya can be read"
        )
    if not layers:
        raise ModelError(f"LoRA {path} holds no tensors: only LoRA files of peft and kohya can be read")
    return layers


def _layer_weights(
    path: Path, name: str, parts: Mapping[_Part, Tensor], metadata: Mapping[str, object]
) -> LoraLayerWeights:
    """Return the weights of one layer, or refuse an incomplete one."""
    if "down" not in parts or "up" not in parts:
        raise ModelError(f"LoRA {path}: {name} lacks one of its two matrices: the file is incomplete")
    down, up = parts["down"].float(), parts["up"].float()
    if min(down.ndim, up.ndim) < 2 or not 0 < down.shape[0] == up.shape[1:].numel():
        raise ModelError(
            f"LoRA {path}: the matrices of {name}, {list(up.shape)} and {list(down.shape)}, have no rank in common: the"
            " file is damaged"
        )
    if "alpha" not in parts:
        return LoraLayerWeights(down, up, _header_alpha(path, name, down.shape[0], metadata))
    if parts["alpha"].numel() != 1:
        raise ModelError(f"LoRA {path}: the alpha of {name} is not a single number: the file is damaged")
    return LoraLayerWeights(down, up, float(parts["alpha"].item()))


def _adapter_metadata(path: Path, header: Mapping[str, str]) -> dict[str, object]:
    """Return peft's configuration in a file's header, empty where there is none."""
    try:
        metadata = json.loads(header.get(ADAPTER_METADATA, "{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ModelError(f"LoRA {path}: {ADAPTER_METADATA} in its header is not a JSON object: save the LoRA again")
    return metadata


def _header_alpha(path: Path, name: str, rank: int, metadata: Mapping[str, object]) -> float:
    """Return a layer's alpha from peft's configuration; the rank where it gives none, as diffusers does.

    peft's rank-stabilised LoRA scales by alpha / sqrt(r): its alpha is multiplied by sqrt(r), so that alpha / r is the
    scale of every layer.
    """
    component, _, module = name.partition(".")
    alpha = metadata.get(f"{component}.lora_alpha")
    if alpha is None:
        return float(rank)
    try:
        patterns = dict(metadata.get(f"{component}.alpha_pattern") or {})  # type: ignore[call-overload]
        alpha = float(patterns.get(get_pattern_key(list(patterns), module), alpha))
    except (TypeError, ValueError, re.error) as error:
        reason = f"lora_alpha or alpha_pattern of {component} in its header is not a number ({error})"
        raise ModelError(f"LoRA {path}: {reason}: save the LoRA again") from error
    return alpha * math.sqrt(rank) if metadata.get(f"{component}.use_rslora") else alpha
