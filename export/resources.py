"""Refuse an export that does not fit into memory or on the disk, before any work begins."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from d2f_fast.errors import RefusedInputError

# Memory that tracing, conversion and ONNX Runtime take beside the weights.
_WORKING_BYTES = 700 * 2**20


def available_memory_bytes() -> int | None:
    """Return the bytes of memory that can be taken without swapping; None where the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_memory_to_load(model: str, variant: str | None = None) -> None:
    """Refuse a local model whose float32 weights do not fit into memory, before they are read.

    The size of a model on the hub is unknown at this point, so it is not refused.

    Args:
        model: path of a pipeline folder or a .safetensors file, or a hub id.
        variant: variant of the weight files, such as "fp16"; None for the files without one.

    Raises:
        RefusedInputError: the weights need more memory than is free.
    """
    path, free = Path(model), available_memory_bytes()
    files = _loaded_files(path, variant) if path.is_dir() else [path] if path.is_file() else []
    parameters = 0
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # the loader reports what is wrong with this file
    if free is not None and 4 * parameters > free:
        raise RefusedInputError(
            f"{path.name} takes {4e-9 * parameters:.1f} GB of memory in float32, have {free / 1e9:.1f}: make room"
        )


def _loaded_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files that loading a pipeline folder reads: one variant alone, and no safety checker."""
    ending = "" if variant is None else f".{variant}"
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
        found = []
        for part in set(parts) - {"safety_checker"}:
            for stem in ("diffusion_pytorch_model", "model"):
                name = f"{stem}{ending}.safetensors"
                shards = folder / part / f"{stem}.safetensors.index{ending}.json"
                if (folder / part / name).is_file():
                    found.append(folder / part / name)
                elif shards.is_file():
                    names = set(json.loads(shards.read_bytes())["weight_map"].values())
                    found += [folder / part / shard for shard in names]
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return []  # the loader reports what is wrong with this folder


def check_resources(weights: Mapping[str, int], output: Path) -> None:
    """Refuse an export that would run out of memory, the model being loaded already, or out of disk.

    Args:
        weights: bytes of each graph's weights as they will be written.
        output: folder that will be written; it need not exist.

    Raises:
        RefusedInputError: too little memory or disk is free.
    """
    # ONNX Runtime holds one graph at a time, and packs a copy of its weights.
    memory, disk = 2 * max(weights.values(), default=0) + _WORKING_BYTES, int(1.1 * sum(weights.values())) + 2**20
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    free_memory, free_disk = available_memory_bytes(), shutil.disk_usage(parent).free
    if disk > free_disk or (free_memory is not None and memory > free_memory):
        have = "?" if free_memory is None else f"{free_memory / 1e9:.1f}"
        raise RefusedInputError(
            f"need {memory / 1e9:.1f} GB of free memory and {disk / 1e9:.1f} GB of disk, have {have} and"
            f" {free_disk / 1e9:.1f}: make room, or export fewer components at a time"
        )
