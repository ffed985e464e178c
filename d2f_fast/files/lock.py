"""Let one process at a time write into a folder.

folder/.lock        locked by the process whose number is in it; removed when that process unlocks it
.lock-folder        the same for a folder that is replaced as a whole

The operating system holds the lock, and drops it when its owner ends in any way: a file that a killed process left
behind locks nothing.
"""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.atomic import StrPath, make_folder

LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)

# Files that this process has locked: a lock inside a lock of the same folder changes nothing.
_locked: set[Path] = set()


@contextmanager
def locked_folder(folder: StrPath) -> Iterator[None]:
    """Keep other processes out of an output folder inside a `with` block.

    Where the file system knows no locks, a warning is logged, and nothing is locked.

    Args:
        folder: Output folder. It is made when missing, and removed at the end if it was made here and is empty.

    Raises:
        RefusedInputError: Another process has locked the folder, or the folder cannot be made or written.
    """
    folder = Path(folder)
    with _made_folder(folder), _locked_file(folder / LOCK_FILE, folder):
        yield


@contextmanager
def locked_place(folder: StrPath) -> Iterator[None]:
    """Keep other processes from making or replacing a folder inside a `with` block, by a file `.lock-NAME` beside it.

    Args:
        folder: Folder that is to be made. Missing folders above it are made, and removed at the end if they are empty.

    Raises:
        RefusedInputError: Another process has locked the place, or it cannot be written.
    """
    folder = Path(folder)
    with _made_folder(folder.parent), _locked_file(folder.with_name(f"{LOCK_FILE}-{folder.name}"), folder):
        yield


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it inside a `with` block; at the end, those made here go if they are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # It is not empty.
                path.rmdir()


@contextmanager
def _locked_file(path: Path, folder: Path) -> Iterator[None]:
    """Lock a file inside a `with` block, and remove it at the end.

    Args:
        path: File of the lock, in a folder that exists.
        folder: Folder that the lock protects, for messages.

    Raises:
        RefusedInputError: Another process has locked the file, or it cannot be written.
    """
    path = path.resolve()
    if path in _locked:
        yield
        return
    descriptor = _open_locked(path, folder)
    _locked.add(path)
    try:
        yield
    finally:
        _locked.discard(path)
        with contextlib.suppress(OSError):  # The folder was renamed or removed meanwhile.
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path, folder: Path) -> int:
    """Return a descriptor that holds the lock of a file; closing it unlocks the file."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RefusedInputError(
                f"{printable(folder)} cannot be written ({error.strerror}): name another"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(descriptor, 20).decode(errors="replace").strip()
                os.close(descriptor)
                by = f"process {owner}" if owner.isdigit() else "another process"
                raise RefusedInputError(
                    f"{printable(folder)} is in use by {by}: wait until it ends, or name another output folder"
                ) from error
            logger.warning("%s cannot be locked (%s): start no other run in this folder", path, error.strerror)
            return descriptor
        # The owner before may have removed the file after it was opened here: then another one counts.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)
