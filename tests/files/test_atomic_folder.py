"""Tests of folders that are replaced whole, and of what a killed process leaves."""

import os
from pathlib import Path

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.files.atomic import atomic_folder, recover_folder


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    dead, own, other = (
        tmp_path / f".tmp-{name}" for name in ("999999999-out", f"{os.getppid()}-out", "999999999-a-out")
    )
    for path in (dead, own, other):
        path.mkdir()
    recover_folder(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([own, other])


def test_folder_of_another_users_running_process_is_kept(tmp_path, monkeypatch):
    def forbidden(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    (tmp_path / ".tmp-1-out").mkdir()
    recover_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-1-out"]


@pytest.mark.parametrize("finished", [False, True])
def test_folder_that_a_killed_process_was_replacing_is_put_back(finished, tmp_path):
    # Killed between its two renames, or after them.
    (tmp_path / ".old-999999999-out").mkdir()
    (tmp_path / ".old-999999999-out/export.json").write_text("old")
    if finished:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/export.json").write_text("new")
    recover_folder(tmp_path / "out")
    assert (tmp_path / "out/export.json").read_text() == ("new" if finished else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fails", [False, True])
def test_folder_is_replaced_only_by_a_whole_one(fails, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    if fails:
        with pytest.raises(KeyError), atomic_folder(tmp_path / "out", replace=True) as folder:
            (folder / "new").write_text("new")
            raise KeyError
    else:
        with atomic_folder(tmp_path / "out", replace=True) as folder:
            (folder / "new").write_text("new")
            assert (tmp_path / "out/old").read_text() == "old"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old" if fails else "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_is_put_back_where_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    rename = Path.rename

    def refuse(self, target):
        if self.name.startswith(".tmp-"):
            raise PermissionError(1, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "out", replace=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/old").read_text() == "old"


def test_existing_folder_is_refused_where_it_is_not_to_be_replaced(tmp_path):
    with pytest.raises(RefusedInputError, match="exists: name a new folder, or remove it"), atomic_folder(tmp_path):
        raise AssertionError("the block must not be entered")


def test_folder_of_an_earlier_process_with_this_process_id_is_replaced(tmp_path):
    (tmp_path / f".tmp-{os.getpid()}-out").mkdir()
    (tmp_path / f".tmp-{os.getpid()}-out/left").touch()
    (tmp_path / f".old-{os.getpid()}-out").mkdir()
    recover_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
