"""Read the files that lie beside the graphs of an export folder, and refuse damaged ones. Imports no torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from d2f_fast.config import DEFAULT_STEPS
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.sampling.options import ChosenSteps

# Lists of a step table that the graphs of a sampler take, one number for each step.
TABLE_INPUTS = ("timesteps", "coef_x", "coef_out")
# Lists of a step table, and by how many numbers each is longer than the number of steps.
_TABLE_KEYS = {**dict.fromkeys(TABLE_INPUTS, 0), "alphas": 1, "noise_scales": 1}


def read_object(folder: Path, name: str, *keys: str) -> dict[str, Any]:
    """Read a JSON object of the folder.

    Args:
        folder: export folder.
        name: path of the file in the folder.
        keys: keys that the object must have.

    Raises:
        RefusedInputError: the file is missing, is not a JSON object, or lacks a key.
    """
    path = folder / name
    cure = "export that component too" if "/" in name else "export again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedInputError(f"{path} cannot be read: {cure}") from error
    if not isinstance(found, dict):
        raise RefusedInputError(f"{path} is not a JSON object: export again")
    for key in keys:
        if key not in found:
            raise RefusedInputError(f"{path} has no {key}: export again")
    return found


def read_tables(folder: Path) -> dict[int, dict[str, list[float]]]:
    """Read the step tables of `unet/steps.json`, by number of steps.

    Raises:
        RefusedInputError: the file is missing or holds no table, or a table is incomplete.
    """
    tables, path = {}, folder / "unet/steps.json"
    for steps, table in read_object(folder, "unet/steps.json").items():
        for name, more in _TABLE_KEYS.items():
            row = table.get(name) if isinstance(table, dict) and steps.isdecimal() else None
            if not isinstance(row, list) or len(row) != int(steps) + more or not all(map(is_finite, row)):
                raise RefusedInputError(f"{path}: {name} for {steps} steps is incomplete: export again")
        tables[int(steps)] = table
    if not tables:
        raise RefusedInputError(f"{path} holds no table: export again")
    return tables


def read_tokenizer(folder: Path, name: str) -> Tokenizer:
    """Read a tokenizer that truncates and pads to the length that its text encoder takes.

    Args:
        folder: export folder.
        name: "tokenizer" or "tokenizer_2".

    Raises:
        RefusedInputError: a file of the tokenizer or of its text encoder is missing or damaged.
    """
    path = folder / name / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other class
        raise RefusedInputError(f"{path} is missing or damaged ({error}): export again") from error
    config = read_object(folder, f"{name}/tokenizer_config.json", "eos_token")
    encoder = read_object(folder, f"{name.replace('tokenizer', 'text_encoder')}/config.json")
    length = min(config.get("model_max_length") or 77, encoder.get("max_position_embeddings", 77))
    padding = config.get("pad_token") or config["eos_token"]
    padding = padding["content"] if isinstance(padding, dict) else padding
    tokenizer.enable_truncation(length)
    pad_id = tokenizer.token_to_id(padding)
    if pad_id is None:
        config_file = path.with_name("tokenizer_config.json")
        raise RefusedInputError(f"{config_file}: {padding} is not a token of tokenizer.json: export again")
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=padding)
    return tokenizer


def latent_sides(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width, in latents, at which a network was trained."""
    size = unet_config.get("sample_size") or 64
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def steps_of_report(folder: Path, report: Mapping[str, Any]) -> ChosenSteps:
    """Return the number of steps that a report recommends, or else 4, and where it comes from.

    Args:
        folder: export folder, for the message.
        report: content of its `export.json`.

    Raises:
        RefusedInputError: the number cannot be used.
    """
    found = report.get("recommended_steps")
    if found is None:
        return ChosenSteps(DEFAULT_STEPS, "the default")
    if not isinstance(found, int):
        got = printable(str(found)[:100])
        raise RefusedInputError(
            f"{folder}: recommended_steps must be a whole number, got {got}: export again, or give steps"
        )
    return ChosenSteps(found, "as saved with the model or LoRA")
