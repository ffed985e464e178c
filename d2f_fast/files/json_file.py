"""Read and write JSON files: reading is bounded in size, writing is atomic."""

import json
from pathlib import Path
from typing import Any

from d2f_fast.errors import CheckpointError
from d2f_fast.files.atomic import StrPath, atomic_path

MAX_JSON_BYTES = 64 * 2**20  # a hostile file must not fill the memory; ours stay below 1 MiB


def write_json(path: StrPath, obj: Any) -> None:
    """Write `obj` as JSON in UTF-8, atomically.

    Raises:
        TypeError: `obj` holds something that JSON has no form for.
        ValueError: `obj` holds NaN or an infinity, which JSON readers other than Python's refuse.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: StrPath) -> Any:
    """Read a JSON file of at most 64 MiB.

    Raises:
        CheckpointError: the file is missing, too large, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes; restore it from an intact copy")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, or a number of too many digits
        raise CheckpointError(f"{path}: not JSON ({error}); restore it from an intact copy") from error
