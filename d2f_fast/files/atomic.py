"""Write files and folders so that they appear whole or not at all."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from d2f_fast.errors import RefusedInputError

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `path` at the end of the block, whole or not at all.

    The temporary file lies in the same folder under a hidden name that keeps the suffix. If the block raises, it is
    removed and `path` keeps what it held.

    Raises:
        RefusedInputError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, path)
        sync_to_disk(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        refuse_full_disk(path, error)
        raise


@contextmanager
def atomic_folder(folder: StrPath, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder` that becomes it at the end of the block, whole or not at all.

    If the block raises, the temporary folder is removed and `folder` stays as it was. `recover_folder` tidies up after
    a process that was killed in the block.

    Args:
        folder: path of the folder to make.
        replace: Replace a folder that exists; the old one is removed only once the new one is in place. Without it, a
            folder that exists is refused.

    Raises:
        RefusedInputError: `folder` exists and is not to be replaced, it cannot be made, or the disk is full.
    """
    folder = Path(folder)
    if folder.exists() and not replace:
        raise RefusedInputError(f"{folder} exists: name a new folder, or remove it")
    make_folder(folder.parent)
    temporary, old = (folder.with_name(f".{kind}-{os.getpid()}-{folder.name}") for kind in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync_to_disk(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync_to_disk(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        refuse_full_disk(folder, error)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: StrPath) -> None:
    """Tidy up after `atomic_folder` in a process that was killed: put back what it was replacing, remove the rest.

    Folders of processes that still run are left alone. Call it before `atomic_folder`, never inside its block.

    Args:
        folder: path that was given to `atomic_folder`.
    """
    folder = Path(folder)
    for path in list(folder.parent.iterdir()) if folder.parent.is_dir() else []:
        found = re.fullmatch(rf"\.(old|tmp)-(\d+)-{re.escape(folder.name)}", path.name)
        if found is None or _is_running(int(found[2])):
            continue
        if found[1] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    """Return whether another process has this id; this process' own id was that of an earlier process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def make_folder(path: StrPath) -> Path:
    """Make a folder, and those above it, where they are missing.

    Raises:
        RefusedInputError: it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedInputError(f"{path} cannot be made a folder ({error.strerror}): name another") from error
    return path


def sync_to_disk(path: Path) -> None:
    """Bring a file's content, or a folder's names, to disk."""
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
    """Say in one line that the disk is full, if that is why `path` could not be written."""
    if is_full_disk(error):
        free = in_mebibytes(shutil.disk_usage(path.parent).free)
        raise RefusedInputError(f"{path}: the disk is full, {free} free; make room and run again") from error


def is_full_disk(error: BaseException | None) -> bool:
    """Tell whether an error, or one that caused it, is a full disk or quota; safetensors gives the number as text."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in numbers):
            return True
        error = error.__cause__
    return False


def in_mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
