"""Write files and folders so that they appear whole or not at all.

folder/                       does not exist, or is complete
.tmp-PID-folder/              being filled by process PID; removed when the process ends, or by the next that writes
.old-PID-folder/              being replaced by process PID; put back if the process was killed between two renames
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from d2f_fast.errors import RefusedInputError, printable

StrPath = str | os.PathLike[str]

# Temporary folders that this process is filling: its number alone would not tell them from those of an earlier process
# that had the same number, as in a container that is started again.
_IN_PROGRESS: set[Path] = set()


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `path` at the end of the block, whole or not at all.

    The temporary file lies in the same folder under a hidden name that keeps the suffix. If the block raises, it is
    removed, and `path` keeps what it held.

    Args:
        path: File to write or replace; its folder must exist.

    Raises:
        RefusedInputError: The file cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.urandom(4).hex()}-{path.name}")
    in_block = True
    try:
        yield temporary
        in_block = False
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # The folder may be the cause of the error.
            temporary.unlink(missing_ok=True)
        refuse_full_disk(path, error)
        if in_block and isinstance(error, OSError) and error.filename in (temporary, str(temporary)):
            raise _not_writable(path, error) from error
        raise


@contextmanager
def atomic_folder(folder: StrPath, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder` that becomes it at the end of the block, whole or not at all.

    What killed processes left of the same folder is tidied up first; see `recover_folder`. If the block raises, the
    temporary folder is removed, and `folder` keeps what it held.

    Args:
        folder: Folder to make; the folders above it are made where they are missing.
        replace: Whether an existing folder may be replaced. It is removed only when the new one is in place.

    Raises:
        RefusedInputError: `folder` exists and `replace` is False, `folder` cannot be made, or the disk is full.
    """
    folder = Path(folder).absolute()
    recover_folder(folder)
    if folder.exists() and not replace:
        raise RefusedInputError(f"{folder} exists: name a new folder, or remove it")
    parent = make_folder(folder.parent)
    temporary, replaced = (parent / f".{kind}-{os.getpid()}-{folder.name}" for kind in ("tmp", "old"))
    try:
        temporary.mkdir()
    except OSError as error:
        refuse_full_disk(folder, error)
        raise RefusedInputError(f"{folder} cannot be made ({error.strerror}): name another folder") from error
    _IN_PROGRESS.update((temporary, replaced))
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync_to_disk(path)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync_to_disk(parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        refuse_full_disk(folder, error)
        raise
    finally:
        _IN_PROGRESS.difference_update((temporary, replaced))


def check_writable(path: StrPath) -> None:
    """Refuse a file or folder that cannot be written, before the work whose result it is to be. Nothing is left there.

    Args:
        path: File or folder that will be written. Those above it may be missing.

    Raises:
        RefusedInputError: A file stands where a folder is needed, or nothing can be written there.
    """
    path = Path(path)
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    try:
        # The rights alone do not say it: root has all of them, also where a file system takes no file.
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> RefusedInputError:
    """Return the error of a path that cannot be written."""
    return RefusedInputError(f"{printable(path)} cannot be written ({error.strerror}): name another")


def recover_folder(folder: StrPath) -> None:
    """Tidy up what killed processes left when they wrote the same folder with `atomic_folder`.

    A folder that was being replaced is put back if its successor is not in place. Other leftovers are removed. Folders
    of processes that still run are left alone.

    Args:
        folder: Folder that `atomic_folder` was to make.
    """
    folder = Path(folder).absolute()
    for path in list(folder.parent.iterdir()) if folder.parent.is_dir() else []:
        found = re.fullmatch(rf"\.(old|tmp)-(\d+)-{re.escape(folder.name)}", path.name)
        if found is None or path in _IN_PROGRESS or _is_other_running_process(int(found[2])):
            continue
        if found[1] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def make_folder(path: StrPath) -> Path:
    """Make a folder, and the folders above it, where they are missing.

    Args:
        path: Folder to make.

    Returns:
        The folder.

    Raises:
        RefusedInputError: The folder cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedInputError(f"{path} cannot be made a folder ({error.strerror}): name another") from error
    return path


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk.

    Args:
        path: File or folder.

    Raises:
        OSError: The disk could not store it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space filesystems cannot sync a folder; they keep its names by other means.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def refuse_full_disk(path: Path, error: BaseException) -> None:
    """Raise a one-line error if `path` could not be written because the disk is full; return otherwise.

    Args:
        path: File or folder that could not be written.
        error: Error that was raised when it was written.

    Raises:
        RefusedInputError: The disk is full.
    """
    if is_full_disk(error):
        free = in_mebibytes(shutil.disk_usage(path.parent).free)
        raise RefusedInputError(f"{path}: the disk is full, {free} free; make room and run again") from error


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that the disk or the quota is full.

    Args:
        error: Error to look at. safetensors gives the error number as text only.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in numbers):
            return True
        error = error.__cause__
    return False


def in_mebibytes(size_bytes: int) -> str:
    """Return a size as text in MiB, with one decimal."""
    return f"{size_bytes / 2**20:.1f} MiB"


def _is_other_running_process(pid: int) -> bool:
    """Return whether another process than this one has the number and is running."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
