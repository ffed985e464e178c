"""Read what the header of a LoRA file says: its layers, their shapes, ranks and scales. Imports no torch.

The keys that are understood are those of `file_keys`, and the forms of an update those of `layer_weights`. `read` then
reads the numbers of the same file.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.tensor_header import TensorInfo, read_tensor_header
from d2f_fast.lora.family import Family, family_of_text_width
from d2f_fast.lora.file_keys import component_of, describe_format, split_key
from d2f_fast.lora.scales import PeftScales
from d2f_fast.lora.shapes import UpdateShape, loha_shape, lokr_shape, lora_shape
from d2f_fast.lora.source import check_lora_file

_KNOWN_NAMES = re.compile(r"unet\.|text_encoder(_2)?\.|lora_(unet|te|te1|te2)_")
_FAMILY_OF_VERSION: dict[str, Family] = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_": "sdxl"}
_SHAPE_OF_KIND = {"lora": lora_shape, "hada": loha_shape, "lokr": lokr_shape}


class LayerHeader(NamedTuple):
    """Update of one layer as the header of a file describes it.

    Attributes:
        stem: The file's own name of the layer, for messages.
        keys: Key of each part, by the part's name in `file_keys`.
        kind: Form of the update: "lora" for two matrices, also with LoCon's core or DoRA's magnitude, "hada" for LoHa,
            "lokr" for LoKr.
        shape: Shape and rank of the update.
        alpha: Number that scales the update, as peft's configuration gives it; None where the file has a tensor for it,
            or nothing that says it.
        divisor: Rank that divides the alpha of LoKr, as peft's configuration gives it; None where nothing says it.
    """

    stem: str
    keys: dict[str, str]
    kind: Literal["lora", "hada", "lokr"]
    shape: UpdateShape
    alpha: float | None
    divisor: int | None

    @property
    def is_dora(self) -> bool:
        """Return whether the update depends on the weight that is adapted."""
        return "magnitude" in self.keys


@dataclass(frozen=True)
class LoraHeader:
    """Header of a LoRA file.

    Attributes:
        path: The file.
        layers: Each adapted layer, by the name that `file_keys` gives it.
        entries: Text entries.
    """

    path: Path
    layers: dict[str, LayerHeader]
    entries: dict[str, str]


def read_lora_header(source: StrPath) -> LoraHeader:
    """Read the header of a LoRA file, and refuse what no numbers could make usable.

    Args:
        source: `.safetensors` file, or a folder that holds one; see `lora_path`.

    Raises:
        ModelError: The file holds another kind of adapter, lacks a matrix, has matrices that do not fit each other, or
            states scales that cannot be used.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    path = check_lora_file(source)
    header = read_tensor_header(path)
    keys, stems = _group_by_layer(path, header.tensors)
    _check_alphas(path, keys, stems)
    scales = PeftScales(path, header.entries)
    layers = {
        name: _layer(path, stems[name], name, {part: (key, header.tensors[key]) for part, key in found.items()}, scales)
        for name, found in keys.items()
    }
    return LoraHeader(path, layers, header.entries)


def family_of_lora(lora: LoraHeader) -> Family | None:
    """Return the family of the model that a LoRA was trained for, or None where the file does not show it.

    Args:
        lora: Header of the file. The width of the text that its layers take decides, and its entries where it has none
            of them.
    """
    for name, layer in lora.layers.items():
        if re.search(r"attn2[._]to_[kv]$", name) and component_of(name) == "unet":
            return family_of_text_width(layer.shape.columns)
    version = lora.entries.get("ss_base_model_version", "")
    return next((family for start, family in _FAMILY_OF_VERSION.items() if version.startswith(start)), None)


def common_family(loras: Sequence[LoraHeader]) -> Family | None:
    """Return the family of the model that all LoRA were trained for, or None where no file shows it.

    Args:
        loras: Headers of the files, at least one.

    Raises:
        ModelError: They are of different families.
    """
    families = {family_of_lora(lora) for lora in loras}
    if len(families) > 1:
        named = ", ".join(f"{printable(lora.path)} {family_of_lora(lora)}" for lora in loras)
        raise ModelError(f"the LoRA files are of different families ({named}): give LoRA of one model")
    return families.pop()


def _group_by_layer(path: Path, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the keys of each layer and the file's own name of it, or refuse a file that holds anything else."""
    layers: dict[str, dict[str, str]] = {}
    stems: dict[str, str] = {}
    unknown = []
    for key, info in tensors.items():
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        name, part, stem = split
        if part in layers.setdefault(name, {}):
            raise ModelError(f"LoRA {path}: {printable(key)} gives {name} a second time: give one LoRA in a file")
        if info.dtype.startswith("C") or (part != "alpha" and "F" not in info.dtype):
            raise ModelError(
                f"LoRA {path}: {printable(key)} holds numbers of type {info.dtype}, not real ones: the file is damaged"
            )
        layers[name][part] = key
        stems.setdefault(name, printable(stem))
    if unknown:
        known = f"{len(tensors) - len(unknown)} of {len(tensors)} keys can be read; "
        raise ModelError(
            f"LoRA {path}: {known if layers else ''}{describe_format([printable(key) for key in unknown])}"
        )
    if not layers:
        raise ModelError(f"LoRA {path} holds no tensors: give a LoRA file of peft, diffusers, kohya or LyCORIS")
    return layers, stems


def _check_alphas(path: Path, layers: Mapping[str, Mapping[str, str]], stems: Mapping[str, str]) -> None:
    """Refuse a file in which some layers have an alpha, and others have none."""
    with_alpha = [name for name, keys in layers.items() if "alpha" in keys]
    is_of_known_names = any(map(_KNOWN_NAMES.match, with_alpha))
    for name, keys in layers.items():
        if not with_alpha or "alpha" in keys:
            continue
        if is_of_known_names and not _KNOWN_NAMES.match(name):
            raise ModelError(
                f"LoRA {path}: {stems[name]} is a foreign key, of no layer of Stable Diffusion: remove the foreign"
                " keys, or give another file"
            )
        raise ModelError(
            f"LoRA {path}: {stems[name]} has no alpha, and {len(with_alpha)} of {len(layers)} layers have one: the"
            " file is incomplete, download it again"
        )


def _layer(
    path: Path, stem: str, name: str, parts: Mapping[str, tuple[str, TensorInfo]], scales: PeftScales
) -> LayerHeader:
    """Return the update of one layer, or refuse an incomplete one."""
    shapes = {part: info.shape for part, (_, info) in parts.items()}
    has_alpha = "alpha" in parts
    if has_alpha and math.prod(shapes["alpha"]) != 1:
        raise ModelError(
            f"LoRA {path}: the alpha of {stem} is {list(shapes['alpha'])}, not a single number: the file is damaged"
        )
    kinds = {part.partition("_")[0] for part in parts} - {"alpha"}
    kind: Literal["lora", "hada", "lokr"] = "hada" if kinds == {"hada"} else "lokr" if kinds == {"lokr"} else "lora"
    if kind == "lora" and (not {"down", "up"} <= parts.keys() or kinds & {"hada", "lokr"}):
        raise ModelError(f"LoRA {path}: {stem} lacks one of its two matrices: the file is incomplete")
    try:
        shape = _SHAPE_OF_KIND[kind](shapes)
    except (KeyError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"LoRA {path}: {stem}: {reason}: the file is damaged") from error
    alpha = divisor = None
    if not has_alpha:
        rank = {"lora": shape.rank, "hada": shapes.get("hada_w1_b", (0,))[0], "lokr": 0}[kind]
        alpha = scales.alpha(stem, name, rank, "lora_alpha" if kind == "lora" else "alpha")
        # LyCORIS, whose files have an alpha for each layer, ignores it where both factors are whole.
        divisor = scales.rank(stem, name) if kind == "lokr" else None
    return LayerHeader(stem, {part: key for part, (key, _) in parts.items()}, kind, shape, alpha, divisor)
