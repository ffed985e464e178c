"""Files appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.files.atomic import atomic_path, check_writable


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    with pytest.raises(RefusedInputError, match=r"grid\.png: the disk is full, .* MiB free"), atomic_path(path) as new:
        assert new.parent == tmp_path and new.suffix == ".png"
        new.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == ["grid.png"] and path.read_bytes() == b"old"
    with atomic_path(path) as new:
        new.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["grid.png"] and path.read_bytes() == b"new"


def test_place_where_nothing_can_be_written_is_refused_by_the_name_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (Path("/proc/none/out"), Path("/proc/out.png"), tmp_path / "file" / "out"):
        with pytest.raises(RefusedInputError, match=rf"^{path} cannot be written \(.*\): name another$"):
            check_writable(path)
    refused = pytest.raises(RefusedInputError, match=r"^/proc/out\.png cannot be written \(.*\): name another$")
    with refused, atomic_path("/proc/out.png") as new:
        new.write_bytes(b"new")
    check_writable(tmp_path / "new" / "folder" / "out.png")
    assert names(tmp_path) == ["file"]


def test_block_that_writes_nothing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_bytes() == b"old"
