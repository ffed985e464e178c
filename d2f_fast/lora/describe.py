"""Describe a LoRA file from its header and its alphas alone: what it is for, and what is odd about it. No torch."""

import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2f_fast.errors import printable
from d2f_fast.files.tensor_header import TensorHeader, TensorInfo, read_tensor_header
from d2f_fast.lora.family import FAMILY_NAMES, Family, family_of_text_width
from d2f_fast.lora.file_keys import component_of, describe_format, describe_network, split_key

_KINDS = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "magnitude": "DoRA", "mid": "LoCon with a core"}
_NUMBER_FORMATS = {
    **{"F32": "<f", "F16": "<e", "F64": "<d", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"},
    **{"U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B"},
}
_Layers = dict[str, dict[str, tuple[str, TensorInfo]]]


def describe_lora(path: Path) -> dict[str, Any]:
    """Return what a LoRA file is, what it needs, and what is odd about it.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is damaged, or a pickle.
    """
    header = read_tensor_header(path)
    layers, foreign = _layers(header)
    ranks = {name: parts["down"][1].shape[0] for name, parts in layers.items() if "down" in parts and _shape(parts)}
    alphas = {name: value for name, parts in layers.items() if (value := _number(path, parts.get("alpha"))) is not None}
    family, source = _family(layers, header.entries)
    kinds = sorted({kind for parts in layers.values() for part in parts if (kind := _KINDS.get(part))})
    components = Counter(component_of(name) for name in layers)
    return {
        "kind": ", ".join(kinds) or "LoRA",
        "family": f"{FAMILY_NAMES[family] if family else 'not known'} ({source})",
        "names": _names(header, layers),
        "layers": ", ".join(f"{count} of {component}" for component, count in sorted(components.items())),
        "rank": _counts(ranks.values()),
        "scale": _scales(ranks, alphas, header.entries),
        "types": _counts(info.dtype for info in header.tensors.values()),
        "parameters": sum(info.elements for info in header.tensors.values()),
        "bytes": path.stat().st_size,
        "entries": {name: value for name, value in header.entries.items() if _is_told(name)},
        "needs": _needs(family, header.entries),
        "odd": _oddities(header, layers, foreign, ranks, alphas),
    }


def shows_no_family(path: Path) -> bool:
    """Return whether neither the layers nor the header of a LoRA file say which family of models it is for.

    Args:
        path: The file. Forms whose layers have no matrix as wide as their input, such as LoKr, may still show it.

    Raises:
        CheckpointError: The file is damaged, or a pickle.
    """
    header = read_tensor_header(path)
    layers, _ = _layers(header)
    return all("down" in parts for parts in layers.values()) and _family(layers, header.entries)[0] is None


def _layers(header: TensorHeader) -> tuple[_Layers, list[str]]:
    """Return key and description of each part by layer, and the keys that are of no LoRA."""
    layers: _Layers = {}
    foreign = []
    for key, info in header.tensors.items():
        found = split_key(key)
        if found is None:
            foreign.append(key)
        else:
            layers.setdefault(found.layer, {})[found.part] = key, info
    return layers, foreign


def _shape(parts: Mapping[str, tuple[str, TensorInfo]]) -> tuple[int, ...]:
    """Return the shape of a layer's first matrix."""
    return parts["down"][1].shape


def _family(layers: _Layers, entries: Mapping[str, str]) -> tuple[Family | None, str]:
    """Return the family of the model that a LoRA is for, and where that was read."""
    for name, parts in layers.items():
        if re.search(r"attn2[._]to_[kv]$", name) and component_of(name) == "unet" and "down" in parts:
            width = _shape(parts)[1] if len(_shape(parts)) > 1 else 0
            return family_of_text_width(width), f"its layers take text of width {width}"
    starts: dict[str, Family] = {"sdxl": "sdxl", "stable-diffusion-xl": "sdxl", "sd_v2": "sd2", "sd_v1": "sd1"}
    for entry in ("ss_base_model_version", "modelspec.architecture"):
        text = entries.get(entry, "")
        for start, family in starts.items():
            if text.startswith(start):
                return family, f"header {entry}"
    return None, "no layer takes text, and the header names none"


def _names(header: TensorHeader, layers: _Layers) -> str:
    """Return the program whose names a file has."""
    if any(key.startswith("lora_") for key in header.tensors):
        is_sgm = any(re.search(r"_(input|output)_blocks_\d", name) for name in layers)
        is_diffusers = any(re.search(r"_(down|up)_blocks_\d", name) for name in layers)
        return "kohya, " + {(True, False): "sgm blocks", (True, True): "sgm and diffusers blocks"}.get(
            (is_sgm, is_diffusers), "diffusers blocks"
        )
    if any(".lora_A." in key for key in header.tensors):
        return "peft" if any(key.startswith("unet.") for key in header.tensors) else "peft, without a component"
    return "diffusers, an older form" if any("lora.down" in key for key in header.tensors) else "others"


def _scales(ranks: Mapping[str, int], alphas: Mapping[str, float], entries: Mapping[str, str]) -> str:
    """Return the factors that alpha / rank gives, with the number of layers."""
    if not alphas:
        return "lora_alpha in the header" if "lora_adapter_metadata" in entries else "1, as the file has no alpha"
    return _counts(round(alphas[name] / rank, 4) for name, rank in ranks.items() if rank and name in alphas)


def _needs(family: Family | None, entries: Mapping[str, str]) -> list[str]:
    """Return what a LoRA is used with."""
    base = f"a model of {FAMILY_NAMES[family]}" if family else "the model that it was trained for"
    prediction = entries.get("d2f.prediction_type") or entries.get("modelspec.prediction_type")
    needs = [f"{base}{f', which predicts {prediction}' if prediction else ''}"]
    if sigmas := entries.get("d2f.recommended_sigmas"):
        steps = sigmas.count(",")
        needs.append(f"the sigmas {sigmas} for {steps} step{'' if steps == 1 else 's'}, as it was trained for")
    return needs


def _oddities(
    header: TensorHeader, layers: _Layers, foreign: list[str], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> list[str]:
    """Return what readers of LoRA files trip over."""
    odd = []
    if foreign:
        odd.append(f"{len(foreign)} of {len(header.tensors)} keys are foreign: {printable(describe_format(foreign))}")
    if network := describe_network(layers):
        odd.append(f"its layers are of {network}")
    halves = [name for name, parts in layers.items() if ("down" in parts) != ("up" in parts)]
    if halves:
        odd.append(f"{len(halves)} layers lack one of their two matrices, such as {printable(halves[0])}")
    if bad := [name for name, parts in layers.items() if {"down", "up"} <= parts.keys() and not _has_rank(parts)]:
        odd.append(f"{len(bad)} layers have matrices without a common rank, such as {printable(bad[0])}")
    if alphas and len(alphas) < len(layers):
        odd.append(f"{len(layers) - len(alphas)} of {len(layers)} layers have no alpha")
    elif not alphas and any(key.startswith("lora_") for key in header.tensors):
        odd.append("alpha is missing in every layer: programs then take a scale of 1")
    if bad := [name for name, alpha in alphas.items() if not 0 < abs(alpha) < 1e6]:
        odd.append(f"{len(bad)} layers have an alpha of {alphas[bad[0]]:g}, such as {printable(bad[0])}")
    if len(set(ranks.values())) > 1:
        odd.append("mixed ranks: diffusers before 0.32 reads only files of one rank right")
    if any(component_of(name) == "unet" and "down" in parts and "mid" in parts for name, parts in layers.items()):
        odd.append("LoCon's core (mid): diffusers does not read it")
    if any(re.search(r"(conv_in|conv_out|input_blocks_0_0|_out_2)$", name) for name in layers):
        odd.append("it adapts the first or last convolution, which kohya's scripts leave out")
    matrices = {key: info for parts in layers.values() for part, (key, info) in parts.items() if part != "alpha"}
    if bad := [key for key, info in matrices.items() if "F" not in info.dtype]:
        odd.append(f"{len(bad)} matrices are of type {matrices[bad[0]].dtype}, which no loader reads, such as {bad[0]}")
    if len({info.dtype for parts in layers.values() for part, (_, info) in parts.items() if part != "alpha"}) > 1:
        odd.append("its matrices are of several types")
    return odd


def _has_rank(parts: Mapping[str, tuple[str, TensorInfo]]) -> bool:
    """Return whether the two matrices of a layer have a common rank above 0."""
    down, up = _shape(parts), parts["up"][1].shape
    return len(down) > 1 and len(up) > 1 and down[0] == up[1] > 0


def _is_told(name: str) -> bool:
    """Return whether a header entry says something of the LoRA, and not of every picture that it was trained on."""
    return name.startswith(("d2f.", "modelspec.")) or name in (
        *("ss_base_model_version", "ss_v2", "ss_network_dim", "ss_network_alpha", "ss_network_module"),
        "ss_zero_terminal_snr",
    )


def _number(path: Path, part: tuple[str, TensorInfo] | None) -> float | None:
    """Return the single number that a tensor holds, or None where it is missing or of another form."""
    if part is None or part[1].elements != 1:
        return None
    info = part[1]
    with path.open("rb") as file:
        file.seek(info.start)
        data = file.read(info.size)
    if info.dtype in ("BF16", "F8_E5M2"):  # They are the first bytes of a float32 and of a float16.
        return float(struct.unpack("<f" if info.dtype == "BF16" else "<e", bytes(info.size) + data)[0])
    if info.dtype == "F8_E4M3":
        exponent, fraction = data[0] >> 3 & 15, data[0] & 7
        value = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
        return math.nan if data[0] & 127 == 127 else -value if data[0] >> 7 else value
    return float(struct.unpack(_NUMBER_FORMATS[info.dtype], data)[0]) if info.dtype in _NUMBER_FORMATS else None


def _counts(values: Iterable[object]) -> str:
    """Return each value with the number of times that it occurs, the most frequent first."""
    counted = Counter(values).most_common()
    return str(counted[0][0]) if len(counted) == 1 else ", ".join(f"{value} ({count}×)" for value, count in counted[:8])
