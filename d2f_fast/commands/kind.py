"""See from its name and its files what a path holds: a model, a LoRA, a data set, a run or its parts. No torch."""

import re
from pathlib import Path
from typing import Literal

from d2f_fast.data.file_names import METADATA_FILE, is_image
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.tensor_header import TensorHeader, read_tensor_header
from d2f_fast.files.walk import files_below
from d2f_fast.lora.file_keys import split_key
from d2f_fast.models.names import ORIGINAL_PREFIXES, refuse_pickle

_MOST_FILES = 20_000  # in which an image is looked for
Kind = Literal[
    "model folder", "model file", "LoRA", "cache", "run", "checkpoint", "pairs", "export", "data set", "unknown file"
]


def kind_of(path: Path) -> Kind:
    """Return what a path holds.

    Args:
        path: File or folder.

    Raises:
        RefusedInputError: There is no such path, it is a pickle, or a folder that holds nothing that is known here.
    """
    refuse_pickle(path)
    if path.is_dir():
        return _kind_of_folder(path)
    return kind_of_header(read_tensor_header(path))


def kind_of_header(header: TensorHeader) -> Kind:
    """Return what a safetensors file holds.

    Args:
        header: Header of the file.
    """
    if any(split_key(key) is not None for key in header.tensors):
        return "LoRA"
    return "model file" if any(key.startswith(ORIGINAL_PREFIXES) for key in header.tensors) else "unknown file"


def _kind_of_folder(folder: Path) -> Kind:
    """Return what a folder holds, from the names of its files."""
    names = {entry.name for entry in folder.iterdir()}
    if {"export.json", "model_index.json"} <= names:
        return "export"
    if "model_index.json" in names:
        return "model folder"
    if {"manifest.json", "state.json"} <= names:
        return "checkpoint"
    if "pairs.json" in names:
        return "pairs"
    if names & {"log.jsonl", "pipeline"} or any(re.fullmatch(r"checkpoint-\d+", name) for name in names):
        return "run"
    if any(name.endswith(".safetensors") for name in names):
        return "LoRA"
    if any(re.fullmatch("[0-9a-f]{2}", name) for name in names) and any(folder.glob("[0-9a-f][0-9a-f]/*.safetensors")):
        return "cache"
    if METADATA_FILE in names or any(is_image(path.name) for path in files_below(folder, _MOST_FILES)):
        return "data set"
    raise RefusedInputError(
        f"{printable(folder)} holds neither a model, a LoRA, a cache, a run, pairs, an export nor images among its"
        f" first {_MOST_FILES:,} files: check the path"
    )
