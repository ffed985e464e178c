"""Find the files of two folders that belong together by their names. Imports no torch."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from d2f_fast.errors import DatasetError, printable

_NAMED = 3  # files that a message names


def files_by_stem(folder: Path, reads: Callable[[str], bool]) -> dict[str, Path]:
    """Return the files at any depth that can be read, by their path in the folder without the extension.

    Args:
        folder: Folder of the files. Hidden files and folders are passed over.
        reads: Function that says by its name whether a file is read.

    Raises:
        DatasetError: Two files have the same name but for the extension.
    """
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not reads(name):
                continue
            path = Path(parent, name)
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise DatasetError(f"{printable(path)} and {printable(found[stem])} have one name: remove one of them")
            found[stem] = path
    return found


def check_partners(folder: Path, files: Mapping[str, Mapping[str, Path]]) -> None:
    """Refuse a folder in which a file of one kind has no partner of the other kind.

    Args:
        folder: Folder of both kinds, for the message.
        files: Files of two kinds, each by its stem as `files_by_stem` returns them, by the name of the kind.

    Raises:
        DatasetError: A file has no partner; the message names it.
    """
    (first, of_first), (second, of_second) = files.items()
    for kind, here, there in ((second, of_first, of_second), (first, of_second, of_first)):
        if lonely := sorted(here.keys() - there.keys()):
            named = ", ".join(printable(here[stem]) for stem in lonely[:_NAMED])
            raise DatasetError(
                f"{printable(folder)}: {len(lonely)} of {len(here)} files have no {kind} of the same name, such as"
                f" {named}: add what is missing, or remove them"
            )
