"""Hashes of files: which changes are noticed, and what a damaged index costs."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from d2f_fast.files import hashes as hashes_module
from d2f_fast.files.hashes import FileHashes, equal_files, file_sha256

FORK = multiprocessing.get_context("fork")


def settled(path: Path, content: bytes, changed: int = 1_700_000_000) -> Path:
    path.write_bytes(content)
    os.utime(path, (changed, changed))
    return path


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files whose bytes were hashed."""
    names: list[str] = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(
        hashes_module.hashlib,
        "file_digest",
        lambda file, kind: names.append(Path(file.name).name) or file_digest(file, kind),
    )
    return names


def test_unchanged_file_is_not_hashed_again(tmp_path, hashed):
    path = settled(tmp_path / "a.png", b"one")
    hashes = FileHashes(tmp_path / "index")
    for _ in range(3):
        assert hashes(path) == hashlib.sha256(b"one").hexdigest()
    assert FileHashes(tmp_path / "index")(path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["a.png"]


def test_changed_file_is_hashed_again(tmp_path, hashed):
    hashes = FileHashes(tmp_path / "index")
    for content, changed in [(b"one", 1_600_000_000), (b"two", 1_700_000_000), (b"three", 1_700_000_000)]:
        path = settled(tmp_path / "a.png", content, changed)
        assert hashes(path) == hashlib.sha256(content).hexdigest()
        assert FileHashes(tmp_path / "index")(path) == hashlib.sha256(content).hexdigest()
    assert len(hashed) == 3


def test_recently_written_file_is_not_remembered(tmp_path):
    hashes = FileHashes(tmp_path / "index")
    path = tmp_path / "a.png"
    for content in (b"one", b"two"):
        path.write_bytes(content)
        now = time.time()
        os.utime(path, (now, now))
        assert hashes(path) == hashlib.sha256(content).hexdigest()
    assert not (tmp_path / "index").exists()


def test_damaged_index_lines_are_skipped_and_their_files_hashed_again(tmp_path, hashed):
    index = tmp_path / "index"
    names = ("a.png", "b.png", "c\n\udcff.png")
    paths = [settled(tmp_path / name, os.fsencode(name)) for name in names]
    hashes = FileHashes(index)
    for path in paths:
        hashes(path)
    lines = index.read_bytes().split(b"\n")
    assert len([line for line in lines if line]) == 3
    index.write_bytes(
        b"\n".join([b"\xff\x00", b"[1, 2]", b"7", b'[["x"], 1, 2, 3, 4, "y"]', *lines[:-2], lines[-2][:30]])
    )
    hashed.clear()
    again = FileHashes(index)
    assert [again(path) for path in paths] == [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    assert hashed == [names[2]]
    assert all(FileHashes(index)._known.get(str(path)) for path in paths)


def hash_forever(index: Path, paths: list[Path]) -> None:
    while True:
        hashes = FileHashes(index)
        hashes._known.clear()
        for path in paths:
            hashes(path)


def test_processes_killed_while_indexing_leave_an_index_of_right_hashes(tmp_path):
    paths = [settled(tmp_path / f"{number}.png", str(number).encode()) for number in range(50)]
    expected = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(50)]
    index, kills = tmp_path / "index", 0
    while kills < 5 or (kills < 200 and not (index.exists() and index.stat().st_size > 1000)):  # more under load
        kills += 1
        workers = [FORK.Process(target=hash_forever, args=(index, paths)) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.05)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    with index.open("ab") as file:
        file.write(json.dumps([str(paths[0]), 1, 1, 1, 1, "0" * 64])[:-1].encode())  # cut short, as by a full disk
    assert index.stat().st_size > 1000
    for _ in range(2):
        hashes = FileHashes(index)
        assert [hashes(path) for path in paths] == expected


@pytest.mark.parametrize("in_place", [True, False])
def test_replaced_file_of_equal_size_and_time_is_noticed(tmp_path, in_place):
    hashes = FileHashes(tmp_path / "index")
    path = settled(tmp_path / "a.png", b"one")
    assert hashes(path) == hashlib.sha256(b"one").hexdigest()
    before = path.stat()
    for _ in range(1000):  # until the clock of the file system has moved on
        if in_place:
            settled(path, b"two")
        else:
            os.replace(settled(tmp_path / "new.png", b"two"), path)
        if path.stat().st_ctime_ns != before.st_ctime_ns:
            break
        time.sleep(0.001)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hashes(path) == hashlib.sha256(b"two").hexdigest()
    assert FileHashes(tmp_path / "index")(path) == hashlib.sha256(b"two").hexdigest()


def test_index_lines_of_an_older_form_are_hashed_again(tmp_path, hashed):
    path = settled(tmp_path / "a.png", b"one")
    status = path.stat()
    older = [str(path), status.st_size, status.st_mtime_ns, "0" * 64]
    (tmp_path / "index").write_text(json.dumps(older) + "\n")
    assert FileHashes(tmp_path / "index")(path) == hashlib.sha256(b"one").hexdigest()
    assert hashed == ["a.png"]


def test_hash_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


def test_files_of_equal_content_are_found_under_any_name(tmp_path: Path) -> None:
    for name, content in (("a", b"12"), ("b", b"34"), ("c", b"567"), ("d", b"34"), ("e", b"99")):
        (tmp_path / name).write_bytes(content)
    first, others = [tmp_path / name for name in "abc"], [tmp_path / name for name in "de"]
    assert equal_files(first, others) == [tmp_path / "b"]
