"""One process at a time writes into a folder, and a killed one leaves no lock behind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.files import lock
from d2f_fast.files.lock import LOCK_FILE, locked_folder, locked_place

OWNER = """
import sys, time
from d2f_fast.files.lock import locked_folder
with locked_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def start_owner(folder: Path) -> "subprocess.Popen[str]":
    """Start a process that locks a folder until its standard input ends, and wait until it has."""
    command = [sys.executable, "-c", OWNER, str(folder)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
    return owner


def test_second_process_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    sentence = f"{tmp_path} is in use by process {owner.pid}: wait until it ends, or name another output folder"
    for _ in range(2):  # the refused process leaves the owner's file as it is
        with pytest.raises(RefusedInputError) as caught, locked_folder(tmp_path):
            pass
        assert str(caught.value) == sentence
    owner.communicate("")
    with locked_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with locked_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_inside_a_lock_changes_nothing(tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        with locked_folder(tmp_path / "." / ""):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_folder_made_for_the_lock_goes_where_nothing_was_written(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "empty"):
        pass
    with locked_folder(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "used"]


def test_lock_file_that_its_owner_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        taken(descriptor, operation)
        monkeypatch.setattr(lock.fcntl, "flock", taken)
        (tmp_path / LOCK_FILE).unlink()  # the owner before unlocks between the opening and the locking of the file

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_file_system_without_locks_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked_folder(tmp_path):
        pass
    assert "cannot be locked (Operation not supported): start no other run in this folder" in caplog.text


def test_place_of_a_folder_is_locked_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with locked_place(place):
        assert [path.name for path in tmp_path.rglob("*")] == ["a", ".lock-b"]
        code = "import sys; from d2f_fast.files.lock import locked_place as l\nwith l(sys.argv[1]): pass"
        done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True)
        assert f"{place} is in use by process {os.getpid()}: wait until" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefusedInputError, match="file cannot be made a folder"), locked_folder(tmp_path / "file"):
        pass
