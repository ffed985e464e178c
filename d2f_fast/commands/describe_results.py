"""Describe the folders that commands write beside runs: an export, a checkpoint and pairs. No torch is imported."""

from pathlib import Path
from typing import Any

from d2f_fast.errors import CheckpointError, printable
from d2f_fast.files.json_file import read_json
from d2f_fast.files.walk import bytes_below
from d2f_fast.lora.describe import describe_lora
from d2f_fast.lora.source import LORA_FILE

_OF_EXPORT = ("model", "prediction_type", "shift", "static", "unroll", "with_vae", "opset", "target", "verified")
_OF_PAIRS = ("solver", "num_inference_steps", "seed", "height", "width", "dtype", "prompts", "model", "lora")


def describe_export(folder: Path) -> dict[str, Any]:
    """Return what an export holds, from its report.

    Args:
        folder: Folder that export/to_onnx.py wrote.

    Raises:
        CheckpointError: The report is damaged.
    """
    report = _object(folder / "export.json")
    table = folder / "unet" / "steps.json"
    guidance, steps, adapters = (report.get(name) for name in ("recommended_guidance", "recommended_steps", "adapters"))
    return {
        "kind": "ONNX export",
        **{name.replace("_", " "): report[name] for name in _OF_EXPORT if report.get(name) not in (None, 0)},
        "precision": report.get("precision", {}),
        "LoRA": ", ".join(str(each.get("file")) for each in adapters or [] if isinstance(each, dict)) or "none",
        "steps": (", ".join(_object(table)) if table.is_file() else "no table of steps")
        + (f"; {steps} recommended" if steps is not None else ""),
        "guidance": ("built into the sampler" if report.get("guidance") else "not built into the sampler")
        + (f", {guidance} recommended" if guidance is not None else ""),
        "bytes": bytes_below(folder),
        "needs": [f"`d2f sample --onnx {printable(folder)}`, or a program of your own (docs/deploy.md)"],
        "odd": [] if report.get("verified") else ["its graphs were not compared with torch"],
    }


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, from its manifest.

    Args:
        folder: Folder checkpoint-N of a run.

    Raises:
        CheckpointError: The manifest or the LoRA file is damaged.
    """
    lora = folder / LORA_FILE
    return {
        "kind": "checkpoint of a run",
        "step": _object(folder / "manifest.json").get("step"),
        "results": {lora.name: describe_lora(lora)} if lora.is_file() else {},
        "bytes": bytes_below(folder),
        "needs": [
            f"--resume_from_checkpoint {printable(folder)}, with the other options of its run, continues from it"
        ],
        "odd": [],
    }


def describe_pairs(folder: Path) -> dict[str, Any]:
    """Return how pairs were made, and how many are finished, from their record and the names of the shards.

    Args:
        folder: Output folder of `d2f pairs`.

    Raises:
        CheckpointError: The record is damaged.
    """
    record = _object(folder / "pairs.json")
    number, per_shard = (record.get(name) for name in ("num_pairs", "pairs_per_shard"))
    if not isinstance(number, int) or not isinstance(per_shard, int) or per_shard < 1:
        raise CheckpointError(f"{printable(folder / 'pairs.json')} says no number of pairs: write the folder again")
    wanted, found = -(-number // per_shard), len(list(folder.glob("*.tar")))
    lowest, highest = record.get("guidance_scale"), record.get("guidance_scale_max")
    return {
        "kind": "pairs of noise and latents",
        "pairs": number,
        "shards": f"{found} of {wanted}",
        "guidance": lowest if lowest == highest else f"{lowest} to {highest}",
        **{name.replace("_", " "): record[name] for name in _OF_PAIRS if record.get(name) not in (None, [])},
        "bytes": bytes_below(folder),
        "needs": ["the model with this hash: d2f train --pairs refuses another one"],
        "odd": [f"{wanted - found} shards are missing: the same command of d2f pairs goes on"]
        if found < wanted
        else [],
    }


def _object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that must be an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{printable(path)} is not a JSON object: write the folder again")
    return found
