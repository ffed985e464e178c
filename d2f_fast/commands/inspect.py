"""`d2f inspect`: say what a model, a LoRA, a data set or a result is, and what is odd about it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2f_fast.config import check_text, option
from d2f_fast.errors import CheckpointError, RefusedInputError, printable
from d2f_fast.models.names import MINIATURE

_MOST_LETTERS = 300  # of a value in the table; the thumbnail of a LoRA has thousands
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Inspect:
    """Say what a model, a LoRA, a data set or a result is, and what is odd about it.

    Args:
        path: Folder or .safetensors file on this machine, or "miniature", the tiny model inside this package. Names,
            configurations and headers are read, and no weights.
        dry_run: Check that the path exists, print the options as JSON, and stop.
        json: Print the description as one line of JSON, in place of a table.

    Examples:
        d2f inspect style.safetensors
        d2f inspect run --json
    """

    path: str = field(metadata={"positional": True})
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse a path that does not exist.

        Raises:
            RefusedInputError: There is no such path.
        """
        check_text("path", self.path)
        if self.path != MINIATURE and not os.path.exists(self.path):
            raise RefusedInputError(f"{printable(self.path)}: no such file or folder; check the path")

    def run(self) -> dict[str, Any]:
        """Return the description; its "output" is the text of a table, or the path where JSON is printed.

        Raises:
            RefusedInputError: There is no such path, or nothing that is known here is in it.
        """
        self.check()
        from d2f_fast.models.configs import MINIATURE_FOLDER

        path = MINIATURE_FOLDER if self.path == MINIATURE else Path(self.path)
        description = describe(path)
        return {**description, "output": str(path) if self.json else _text(path, description)}


def describe(path: Path) -> dict[str, Any]:
    """Return what a path holds, what it needs, and what is odd about it.

    Args:
        path: File or folder.

    Raises:
        RefusedInputError: Nothing that is known here is in it, or a file is damaged or a pickle.
    """
    from d2f_fast.commands.describe_results import describe_checkpoint, describe_export, describe_pairs
    from d2f_fast.commands.kind import kind_of
    from d2f_fast.data.describe import describe_cache, describe_data_set
    from d2f_fast.lora.describe import describe_lora
    from d2f_fast.lora.source import check_lora_file
    from d2f_fast.models.describe import describe_model_file, describe_model_folder

    described = {"export": describe_export, "checkpoint": describe_checkpoint, "pairs": describe_pairs}
    kind = kind_of(path)
    if kind in described:
        return described[kind](path)
    if kind == "model folder":
        return describe_model_folder(path)
    if kind == "model file":
        return describe_model_file(path)
    if kind == "LoRA":
        return describe_lora(check_lora_file(path))
    if kind == "cache":
        return describe_cache(path)
    if kind == "data set":
        return describe_data_set(path)
    if kind == "run":
        return describe_run(path)
    return describe_unknown(path)


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder holds, with a description of its result.

    Args:
        folder: Output folder of `d2f train`.

    Raises:
        RefusedInputError: A file of the result is damaged.
    """
    from d2f_fast.files.walk import bytes_below

    checkpoints = sorted(
        (path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    broken = [path.name for path in checkpoints if not (path / "manifest.json").is_file()]
    results = sorted(folder.glob("*.safetensors")) + [path for path in [folder / "pipeline"] if path.is_dir()]
    odd = [f"{', '.join(broken)}: no manifest, so that it is not resumed from"] if broken else []
    if not results:
        odd.append("it has no result yet: it runs, was stopped or was killed; --resume_from_checkpoint latest goes on")
    return {
        "kind": "run",
        "last logged step": _last_step(folder / "log.jsonl"),
        "command": _command(folder / "metrics.json"),
        **_source(folder / "config.json"),
        "checkpoints": ", ".join(path.name for path in checkpoints) or "none",
        "results": {path.name: describe(path) for path in results},
        "bytes": bytes_below(folder),
        "needs": [],
        "odd": odd,
    }


def describe_unknown(path: Path) -> dict[str, Any]:
    """Return what is in a safetensors file that is neither a model in the original layout nor a LoRA.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is damaged, or a pickle.
    """
    from d2f_fast.files.tensor_header import read_tensor_header

    header = read_tensor_header(path)
    examples = ", ".join(map(printable, list(header.tensors)[:3]))
    return {
        "kind": "safetensors file of another kind",
        "tensors": len(header.tensors),
        "parameters": sum(info.elements for info in header.tensors.values()),
        "bytes": path.stat().st_size,
        "entries": {name: value[:200] for name, value in header.entries.items()},
        "needs": [],
        "odd": [f"its keys are of no model and no LoRA, such as {examples}" if examples else "it holds no tensors"],
    }


def _last_step(path: Path) -> str:
    """Return the last step in a run's log, with its loss."""
    if not path.is_file():
        return "none"
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
            return f"{row['step']}, loss {row['loss']}"
        except (ValueError, TypeError, KeyError):
            continue
    return "none"


def _command(path: Path) -> str:
    """Return the command and the seed in the record of a run."""
    from d2f_fast.files.json_file import read_json

    try:
        record = read_json(path)
        return f"{record['command']}, seed {record['seed']}"
    except (CheckpointError, TypeError, KeyError):
        return "not recorded"


def _source(path: Path) -> dict[str, str]:
    """Return the names of the model and of the data in the options of a run."""
    from d2f_fast.files.json_file import read_json

    names = {"base model": "pretrained_model_name_or_path", "images": "train_data_dir", "pairs": "pairs"}
    try:
        options = read_json(path)
        return {label: str(options[name]) for label, name in names.items() if options.get(name)}
    except (CheckpointError, AttributeError):
        return {}


def _text(path: Path, description: Mapping[str, Any], indent: str = "") -> str:
    """Return a description as a table of names and values, with the oddities below it."""
    lines = [f"{indent}{printable(path)}: {description['kind']}"]
    for name, value in description.items():
        if name in ("kind", "odd", "needs") or value in ({}, []):
            continue
        if name == "results":
            lines += [_text(Path(key), found, f"{indent}  ") for key, found in value.items()]
        elif isinstance(value, Mapping):
            lines.append(f"{indent}  {name}:")
            lines += [f"{indent}    {printable(key)}: {printable(_value(name, found))}" for key, found in value.items()]
        else:
            lines.append(f"{indent}  {name}: {printable(_value(name, value))}")
    for name in ("needs", "odd"):
        lines += [f"{indent}  {name}: {text}" for text in description[name]]
    return "\n".join(lines)


def _value(name: str, value: object) -> str:
    """Return a value as text, with its unit."""
    if name == "bytes" and isinstance(value, int):
        power = min(len(_UNITS) - 1, max(0, (len(str(value)) - 1) // 3))
        return f"{value / 1000**power:.4g} {_UNITS[power]}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}… ({len(text):,} letters)"
