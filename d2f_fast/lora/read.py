"""Merge LoRA files into a pipeline's float32 weights, before anything is traced: W += scale * (alpha / r) * B A.

Understood are peft's keys (`unet.….lora_A.weight`, the scale in the header or folded), diffusers' older `.lora.down.`,
and kohya's (`lora_unet_…`, `lora_te_…`, `lora_te1_…`, `lora_te2_…`), with diffusers' or SDXL's sgm block names.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.files.tensor_file import read_metadata

_HALVES = {
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


def _delta(path: Path, name: str, half: Mapping[str, Tensor], module: Any, metadata: Mapping[str, Any]) -> Tensor:
    """(alpha / r) * B A in the shape of the module's weight, float32."""
    own = module.weight.shape
    if "down" not in half or "up" not in half:
        raise ModelError(f"LoRA {path}: {name} lacks one of its two matrices: the file is not whole")
    down, up = half["down"].float().flatten(1), half["up"].float().flatten(1)
    if up.shape[1] != down.shape[0] or up.shape[0] != own[0] or down.shape[1] != own[1:].numel():
        raise ModelError(
            f"LoRA {path}: {name} is {list(half['up'].shape)} times {list(half['down'].shape)}, which does not fit this"
            f" model's {list(own)}: it is of another model"
        )
    rank = down.shape[0]
    factor = half["alpha"].item() / rank if "alpha" in half else _header_factor(path, name, rank, metadata)
    return ((up @ down) * factor).reshape(own)


def _metadata(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration in a file's header, empty where there is none."""
    try:
        metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ModelError(f"LoRA {path}: lora_adapter_metadata in its header is no JSON object: save the LoRA again")
    return metadata


def _header_factor(path: Path, name: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """alpha / r of a peft file's own header; 1 where it says nothing, as diffusers takes it."""
    component, _, module = name.partition(".")
    alpha = metadata.get(f"{component}.lora_alpha")
    if alpha is None:
        return 1.0
    try:
        patterns = dict(metadata.get(f"{component}.alpha_pattern") or {})
        alpha = float(patterns.get(get_pattern_key(list(patterns), module), alpha))
    except (TypeError, ValueError, re.error) as error:
        reason = f"lora_alpha or alpha_pattern of {component} in its header is no number ({error})"
        raise ModelError(f"LoRA {path}: {reason}: save the LoRA again") from error
    return alpha / (math.sqrt(rank) if metadata.get(f"{component}.use_rslora") else rank)


LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_tags(source: str | Path) -> dict[str, str]:
    """What a LoRA file, or the folder that holds one, says of itself: header entries that begin with "d2f."."""
    path = Path(source)
    header = read_metadata(path / LORA_FILE if path.is_dir() else path)
    return {name: value for name, value in header.items() if name.startswith("d2f.")}
