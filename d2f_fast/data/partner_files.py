"""Find the files of two folders that belong together by their names. Imports no torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from d2f_fast.errors import DatasetError, printable

_NAMED = 3  # files that a message names


def find_files(folder: Path, reads: Callable[[str], bool]) -> Iterator[Path]:
    """Yield the files at any depth that can be read. Hidden files and folders are passed over.

    Args:
        folder: Folder of the files.
        reads: Function that says by its name whether a file is read.

    Raises:
        DatasetError: A folder cannot be read or is a link, or a file is a broken link or no regular file.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DatasetError(
            f"{printable(error.filename)} cannot be read ({error.strerror}): check the folder"
        ) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(linked := os.path.join(parent, name)):
                raise DatasetError(f"{printable(linked)} is a link to a folder: replace it by the folder, or remove it")
        for name in names:
            if name.startswith(".") or not reads(name):
                continue
            if not (path := Path(parent, name)).is_file():
                raise DatasetError(f"{printable(path)} is not a file, or a broken link: remove it")
            yield path


def files_by_stem(folder: Path, reads: Callable[[str], bool]) -> dict[str, Path]:
    """Return the files at any depth that can be read, by their path in the folder without the extension.

    Args:
        folder: Folder of the files; see `find_files`.
        reads: Function that says by its name whether a file is read.

    Raises:
        DatasetError: Two files have the same name but for the extension, or `find_files` refuses one.
    """
    found: dict[str, Path] = {}
    for path in find_files(folder, reads):
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
