"""Read and write JSON files. Reading is bounded in size, and writing is atomic."""

import json
from pathlib import Path
from typing import Any

from d2f_fast.errors import CheckpointError
from d2f_fast.files.atomic import StrPath, atomic_path

MAX_JSON_BYTES = 64 * 2**20  # A hostile file must not fill the memory; the files of this package are below 1 MiB.


def write_json(path: StrPath, content: object) -> None:
    """Write an object as indented JSON in UTF-8, whole or not at all.

    Args:
        path: File to write or replace.
        content: Dictionaries, lists, strings, numbers, booleans and None.

    Raises:
        TypeError: `content` holds an object that JSON has no form for.
        ValueError: `content` holds NaN or an infinity, which JSON readers other than Python's refuse.
        RefusedInputError: The disk is full.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: StrPath) -> Any:
    """Read a JSON file of at most 64 MiB.

    Args:
        path: File to read.

    Returns:
        Its content, of any JSON type: the caller checks which.

    Raises:
        CheckpointError: The file is missing, too large, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes; restore it from an intact copy")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError stands for bad JSON, bad UTF-8 and huge numbers.
        raise CheckpointError(f"{path}: not JSON ({error}); restore it from an intact copy") from error
