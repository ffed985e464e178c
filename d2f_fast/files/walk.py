"""List the files below a folder, with a limit, so that no command walks through a whole disk."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MOST_FILES = 100_000


def files_below(folder: Path, most: int | None = None) -> Iterator[Path]:
    """Yield the files of a folder, and then those of the folders in it. Hidden files and folders are left out.

    Args:
        folder: Folder to look into. Links to folders are not followed.
        most: Largest number of files, hidden ones not counted; None for `MOST_FILES`.
    """
    yield from islice(_all_files(folder), MOST_FILES if most is None else most)


def bytes_below(folder: Path) -> int:
    """Return the number of bytes in the files of a folder and of the folders in it, at most `MOST_FILES` of them.

    Args:
        folder: Folder to look into.
    """
    return sum(path.stat().st_size for path in files_below(folder) if path.is_file())


def _all_files(folder: Path) -> Iterator[Path]:
    """Yield all files that are not hidden, in the order of their names."""
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(above, name)
