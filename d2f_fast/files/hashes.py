"""Compute the SHA-256 of files, and remember it for files that have not changed."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from d2f_fast.errors import RefusedInputError, printable

# A file that is written twice within the resolution of its file system's clock keeps its size and time. Only files
# that were last written longer ago than this are remembered.
SETTLED_NS = 2_000_000_000


class FileState(NamedTuple):
    """Properties of a file, of which at least one changes whenever its content changes.

    Attributes:
        size: Size in bytes.
        modified_ns: Time of the last write (mtime), in nanoseconds; programs can set it to any value.
        changed_ns: Time of the last change of content or properties (ctime), in nanoseconds; only the system sets it.
        inode: Number of the file in its file system; another file under the same name has another one.
    """

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


class FileHashes:
    """Return SHA-256 hashes of files, and remember them in an index by path, size, times and inode.

    The index has one line of JSON for each file. Lines that are damaged, cut short by a killed process, or of another
    form are passed over, and their files are hashed again. Several threads and processes may share an index.

    Args:
        index: File of the index. It is made with the first hash that is remembered.

    Raises:
        RefusedInputError: The index exists and cannot be read.
    """

    def __init__(self, index: Path) -> None:
        self._index = index
        self._known: dict[str, tuple[FileState, str]] = {}
        try:
            with index.open("rb") as lines:
                for line in lines:
                    try:
                        path, size, modified_ns, changed_ns, inode, digest = json.loads(line)
                        self._known[path] = FileState(size, modified_ns, changed_ns, inode), digest
                    except (ValueError, TypeError):
                        continue
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RefusedInputError(f"{printable(index)} cannot be read ({error.strerror}): remove it") from error

    def __call__(self, path: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal, and read the file only where it is new or has changed.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            RefusedInputError: The index cannot be written.
        """
        name = os.path.abspath(path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            state = FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            known_state, digest = self._known.get(name, (None, ""))
            if known_state == state:
                return digest
            settled = time.time_ns() - state.modified_ns > SETTLED_NS
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settled:
            self._known[name] = state, digest
            self._append(json.dumps([name, *state, digest]))
        return digest

    def _append(self, line: str) -> None:
        """Add a line to the index."""
        try:
            with self._index.open("ab") as index:
                # The line break comes first: it ends the line that a killed process may have left unfinished.
                index.write(f"\n{line}\n".encode())
        except OSError as error:
            raise RefusedInputError(
                f"cannot write {printable(self._index)} ({error.strerror}): free space, or choose another folder"
            ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: The file, of any size: it is read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def equal_files(paths: Iterable[Path], others: Iterable[Path]) -> list[Path]:
    """Return the files whose content is that of one of the other files. Only files of equal size are read.

    Args:
        paths: Files, of which the equal ones are returned in their order.
        others: Files that they are compared with.

    Raises:
        OSError: A file cannot be read.
    """
    of_size: dict[int, list[Path]] = {}
    for other in others:
        of_size.setdefault(other.stat().st_size, []).append(other)
    hashes: dict[int, set[str]] = {}
    equal = []
    for path in paths:
        size = path.stat().st_size
        if size in of_size:
            if size not in hashes:
                hashes[size] = set(map(file_sha256, of_size[size]))
            if file_sha256(path) in hashes[size]:
                equal.append(path)
    return equal
