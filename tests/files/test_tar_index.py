"""Members of a tar by their offsets, compared with Python's reader, and tars that are damaged or hostile."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from d2f_fast.errors import DatasetError
from d2f_fast.files.tar_index import opened, padded, read_at, tar_members


def write(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE, **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.type, member.size, member.mtime, member.linkname = kind, len(content), 1.5, "x"
            tar.addfile(member, io.BytesIO(content))
    return path


MEMBERS = {"a.txt": b"", "folder/b.bin": bytes(range(256)) * 5, "c" * 120 + "/" + "d" * 90 + "é.txt": b"x" * 512}


@pytest.mark.parametrize(
    "layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT], ids=["pax", "gnu", "ustar"]
)
def test_members_are_those_of_pythons_reader(layout: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS, format=layout)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    found = list(tar_members(path))
    assert [(member.name, member.start, member.size) for member in found] == expected
    with opened(path) as descriptor:
        for member, content in zip(found, MEMBERS.values(), strict=True):
            assert read_at(descriptor, member.size, member.start, path) == content
            assert member.head[: member.size] == content[: len(member.head)]


def test_folders_are_passed_over(tmp_path: Path) -> None:
    assert list(tar_members(write(tmp_path / "a.tar", {"folder": b""}, tarfile.DIRTYPE))) == []


def test_tar_that_is_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + padded(member.size) for member in tar)
    for size in (1, 511, 512, 700, 1024, 1600, end - 1, end, end + 511):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match=r"a\.tar is cut short: download or make it again"):
            list(tar_members(path))
    path.write_bytes(content[: end + 512])
    assert len(list(tar_members(path))) == 3


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "a/.."])
def test_name_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="leaves the folder of the tar"):
        list(tar_members(write(tmp_path / "a.tar", {name: b""})))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.tar: a is not an ordinary file"):
        list(tar_members(write(tmp_path / "a.tar", {"a": b""}, kind)))


def test_damaged_header_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"a": b"1", "b": b"2"}, format=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[1024] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.tar is not a tar file, or is damaged at byte 1024: download"):
        list(tar_members(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"30 path=" + b"x" * 21 + b"\n", None),
        (b"99999999 path=x\n", "a pax header is damaged"),
        (b"no record", "a pax header is damaged"),
        (b"19 size=9999999999\n", "very large members are not read"),
        (b"22 GNU.sparse.major=1\n", "sparse and very large members"),
        (b"x" * 70_000, "a header has 70000 bytes"),
    ],
)
def test_hostile_pax_headers_are_refused(content: bytes, sentence: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, data in (("h", tarfile.XHDTYPE, content), ("a", tarfile.REGTYPE, b"1")):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            tar.addfile(member, io.BytesIO(data))
    if sentence is None:
        assert [member.name for member in tar_members(path)] == ["x" * 21]
        return
    with pytest.raises(DatasetError, match=sentence):
        list(tar_members(path))


@pytest.mark.parametrize("change", ["joined", "hole", "rest"])
def test_tar_that_goes_on_behind_its_end_is_refused(change: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        second, end = tar.getmembers()[1].offset, tar.getmembers()[-1].offset_data + 512
    changed = {
        "joined": content + content,  # As cat does.
        "hole": content[:second] + bytes(512) + content[second + 512 :],
        "rest": content[:second] + bytes(65 << 20),  # An unfinished download in a file of its whole size.
    }
    path.write_bytes(changed[change])
    at = end if change == "joined" else second
    with pytest.raises(DatasetError, match=rf"a\.tar goes on behind the end of the tar at byte {at}, as joined tars"):
        list(tar_members(path))


def test_filling_of_a_large_record_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes() + bytes(3 << 20))
    assert len(list(tar_members(path))) == 3
    path.write_bytes(path.read_bytes() + b"x" * 512)
    with pytest.raises(DatasetError, match="goes on behind the end"):
        list(tar_members(path))


def test_label_of_a_gnu_tar_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("label", b"V"), ("a", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    assert [member.name for member in tar_members(path)] == ["a"]


@pytest.mark.parametrize(("kind", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_compressed_tar_is_told_from_a_damaged_one(kind: str, name: str, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(2000)
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:  # type: ignore[call-overload]
        member = tarfile.TarInfo("a")
        member.size = 2000
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DatasetError, match=rf"a\.tar is compressed with {name}: decompress it first"):
        list(tar_members(tmp_path / "a.tar"))


def test_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DatasetError, match=r"a\.tar is not an ordinary file: give a file"):
        list(tar_members(tmp_path / "a.tar"))


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.tar cannot be read \(No such file or directory\)"):
        list(tar_members(tmp_path / "a.tar"))
