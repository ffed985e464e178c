"""Read LoRA files into the update of each adapted layer. No pipeline is needed.

The keys that are understood are those of `file_keys`, and the forms of an update those of `layer_weights`. The scale
comes from the alpha of each layer, from peft's configuration in the header, or from the `adapter_config.json` beside
the file. `key_names` maps the names of the layers to the modules of a pipeline.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora.file_keys import describe_format, split_key
from d2f_fast.lora.layer_weights import LayerWeights, loha_weights, lokr_weights, lora_weights
from d2f_fast.lora.scales import PeftScales, checked_alpha
from d2f_fast.lora.source import check_lora_file

_KNOWN_NAMES = re.compile(r"unet\.|text_encoder(_2)?\.|lora_(unet|te|te1|te2)_")


@dataclass(frozen=True)
class LoraFile:
    """Content of a LoRA file.

    Attributes:
        path: The file.
        layers: Update of each adapted layer, by the name that `file_keys` gives the layer.
        header: Text entries of the file's header.
        stems: The file's own name of each layer, by the same name, for messages.
    """

    path: Path
    layers: dict[str, LayerWeights]
    header: dict[str, str]
    stems: dict[str, str]


def read_lora(source: StrPath) -> LoraFile:
    """Read a LoRA file.

    Args:
        source: `.safetensors` file, or a folder that holds one; see `lora_path`.

    Raises:
        ModelError: The file holds another kind of adapter, lacks a matrix, or gives no usable scale.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    path = check_lora_file(source)
    tensors, header = read_tensors(path)
    parts, stems = _group_by_layer(path, tensors)
    scales = PeftScales(path, header)
    with_alpha = sum("alpha" in found for found in parts.values())
    is_of_known_names = any(_KNOWN_NAMES.match(name) for name, found in parts.items() if "alpha" in found)
    layers: dict[str, LayerWeights] = {}
    for name, found in parts.items():
        if with_alpha and "alpha" not in found:
            if is_of_known_names and not _KNOWN_NAMES.match(name):
                raise ModelError(
                    f"LoRA {path}: {stems[name]} is a foreign key, of no layer of Stable Diffusion: remove the foreign"
                    " keys, or give another file"
                )
            raise ModelError(
                f"LoRA {path}: {stems[name]} has no alpha, and {with_alpha} of {len(parts)} layers have one: the file"
                " is incomplete, download it again"
            )
        layers[name] = _layer_weights(path, stems[name], name, found, scales)
    return LoraFile(path, layers, header, stems)


def _group_by_layer(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the tensors of each layer and the file's own name of it, or refuse a file that holds anything else."""
    layers: dict[str, dict[str, Tensor]] = {}
    stems: dict[str, str] = {}
    unknown = []
    for key, value in tensors.items():
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        name, part, stem = split
        if part in layers.setdefault(name, {}):
            raise ModelError(f"LoRA {path}: {printable(key)} gives {name} a second time: give one LoRA in a file")
        _check_numbers(path, key, part, value)
        layers[name][part] = value.float()
        stems.setdefault(name, printable(stem))
    if unknown:
        known = f"{len(tensors) - len(unknown)} of {len(tensors)} keys can be read; "
        raise ModelError(
            f"LoRA {path}: {known if layers else ''}{describe_format([printable(key) for key in unknown])}"
        )
    if not layers:
        raise ModelError(f"LoRA {path} holds no tensors: give a LoRA file of peft, diffusers, kohya or LyCORIS")
    return layers, stems


def _check_numbers(path: Path, key: str, part: str, value: Tensor) -> None:
    """Refuse a tensor whose numbers are not real and finite; an alpha may be a whole number."""
    if value.is_complex() or (part != "alpha" and not value.is_floating_point()):
        kind = str(value.dtype).removeprefix("torch.")
        raise ModelError(f"LoRA {path}: {printable(key)} holds {kind} numbers, not real ones: the file is damaged")
    if not value.float().isfinite().all():
        raise ModelError(f"LoRA {path}: {printable(key)} holds NaN or infinity: take an earlier save of the LoRA")


def _layer_weights(path: Path, key: str, name: str, parts: Mapping[str, Tensor], scales: PeftScales) -> LayerWeights:
    """Return the update of one layer, or refuse an incomplete one."""
    alpha = None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ModelError(
                f"LoRA {path}: the alpha of {key} is {list(parts['alpha'].shape)}, not a single number: the file is"
                " damaged"
            )
        alpha = checked_alpha(path, key, parts["alpha"].item())
    kinds = {part.partition("_")[0] for part in parts} - {"alpha"}
    if kinds not in ({"hada"}, {"lokr"}) and (not {"down", "up"} <= parts.keys() or kinds & {"hada", "lokr"}):
        raise ModelError(f"LoRA {path}: {key} lacks one of its two matrices: the file is incomplete")
    try:
        if kinds == {"hada"}:
            rank = parts["hada_w1_b"].shape[0]
            return loha_weights(parts, scales.alpha(key, name, rank, "alpha") if alpha is None else alpha)
        if kinds == {"lokr"}:
            # LyCORIS, whose files have an alpha for each layer, ignores it where both factors are whole.
            divisor = scales.rank(key, name) if alpha is None else None
            return lokr_weights(parts, scales.alpha(key, name, 0, "alpha") if alpha is None else alpha, divisor)
        weights = lora_weights(parts, 1.0)
    except ModelError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"LoRA {path}: {key}: {reason}: the file is damaged") from error
    if alpha is None:
        alpha = scales.alpha(key, name, weights.rank, "lora_alpha") or float(weights.rank)
    return replace(weights, alpha=alpha)
