"""Refuse paths that no output folder can be given, without importing torch or ONNX."""

import os
from pathlib import Path

from d2f_fast.errors import RefusedInputError


def check_place(output: Path) -> None:
    """Refuse a path to which no finished folder could be renamed, before anything is written.

    Args:
        output: absolute path of the output folder.

    Raises:
        RefusedInputError: the path is or holds the current folder, is a mount point, or cannot be created.
    """
    if Path.cwd().is_relative_to(output):
        raise RefusedInputError(f"output {output} is the current folder or contains it: name a new folder")
    if output.is_mount():
        raise RefusedInputError(f"output {output} is a mount point, which cannot be replaced: name a folder in it")
    parent = next(parent for parent in output.parents if parent.exists())
    if not parent.is_dir():
        raise RefusedInputError(f"output {output} cannot be created: {parent} is a file; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedInputError(f"output {output} cannot be created: {parent} is not writable; name another folder")
