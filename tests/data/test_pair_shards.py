"""Shards of pairs: their bytes, their checks, and shards of other programs."""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.pair_shards import PairRecord, pair_bytes, read_shard, write_shard
from d2f_fast.errors import DatasetError, RefusedInputError

Write = Callable[..., Path]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def published(path: Path, members: dict[str, bytes], count: int = 3, **options: Any) -> Path:
    """Write a shard as the program of the published shards does: members by name, with fractional times (pax)."""
    with tarfile.open(path, "w", **options) as tar:
        for i in range(count):
            for name, content in members.items():
                member = tarfile.TarInfo(f"{i:09d}.{name}")
                member.size, member.mtime = len(content), time.time()
                tar.addfile(member, io.BytesIO(content))
    return path


def published_members(shape: tuple[int, ...] = (4, 8, 8)) -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    return {
        "image.jpg": jpeg.getvalue(),
        "image_latent.npy": npy(generator.standard_normal(shape).astype(np.float16)),
        "noise.npy": npy(generator.standard_normal(shape).astype(np.float32)),
        "prompt.txt": b" a lighthouse, \xc3\xa9t\xc3\xa9\n",
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shard_holds_the_published_keys_and_reads_back_exactly(dtype: str, write_pairs: Write, tmp_path: Path) -> None:
    records: list[PairRecord] = []

    def with_image(record: PairRecord) -> PairRecord:
        records.append(record._replace(image=b"jpeg", prompt=f" über {record.key} "))
        return records[-1]

    path = write_pairs(tmp_path / "000003.tar", 5, dtype=dtype, change=with_image, meta={"seed": 2**62, "steps": 4})
    with tarfile.open(path) as tar:  # Python's own reader is the oracle.
        members = tar.getmembers()
        contents = {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    kinds = ["image_latent.npy", "noise.npy", "prompt.txt", "image.jpg", "meta.json"]
    assert list(contents) == [f"{record.key}.{kind}" for record in records for kind in kinds]
    shard = read_shard(path)
    assert len(shard) == 5 and shard.shape == (4, 8, 8) and shard.meta == {"seed": 2**62, "steps": 4}
    for i, record in enumerate(records):
        pair = shard.read(i)
        for array, stored, name in ((pair.latents, record.latents, kinds[0]), (pair.noise, record.noise, kinds[1])):
            assert array.dtype == dtype and np.array_equal(array, stored)
            assert np.array_equal(array, np.load(io.BytesIO(contents[f"{record.key}.{name}"])))
        assert pair.prompt == shard.prompt(i) == record.prompt.strip()
        assert contents[f"{record.key}.prompt.txt"] == record.prompt.encode()
        assert json.loads(contents[f"{record.key}.meta.json"]) == record.meta


def test_same_pairs_give_the_same_bytes(write_pairs: Write, tmp_path: Path) -> None:
    first, second = (write_pairs(tmp_path / name / "000000.tar").read_bytes() for name in "ab")
    assert first == second


def test_size_of_a_pair_is_that_in_the_shard(write_pairs: Write, tmp_path: Path) -> None:
    sizes = [
        write_pairs(
            tmp_path / f"{count}.tar", count, (4, 8, 6), change=lambda record: record._replace(image=b"x" * 700)
        ).stat()
        for count in (20, 40)
    ]
    per_pair = pair_bytes((4, 8, 6), 2, 1, 700)
    # A tar is filled up to a multiple of 10,240 bytes.
    assert abs(sizes[1].st_size - sizes[0].st_size - 20 * per_pair) < 10_240


@pytest.mark.parametrize("options", [{}, {"format": tarfile.GNU_FORMAT}, {"format": tarfile.USTAR_FORMAT}], ids=str)
def test_published_shard_is_read_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    members = published_members()
    shard = read_shard(published(tmp_path / "00000.tar", members, **options))
    assert len(shard) == 3 and shard.meta == {} and shard.shape == (4, 8, 8)
    pair = shard.read(2)
    assert np.array_equal(pair.latents, np.load(io.BytesIO(members["image_latent.npy"])))
    assert np.array_equal(pair.noise, np.load(io.BytesIO(members["noise.npy"])))
    assert pair.prompt == "a lighthouse, été"


@pytest.mark.parametrize("options", [{}, {"format": tarfile.GNU_FORMAT}], ids=["pax", "gnu"])
def test_long_names_are_read_from_their_headers(options: dict[str, Any], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", **options) as tar:
        for folder in ("x" * 150, "y" * 150):
            for name, content in published_members().items():
                member = tarfile.TarInfo(f"{folder}/{'z' * 120}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert len(read_shard(tmp_path / "a.tar")) == 2


def broken(name: str, change: Callable[[dict[str, bytes]], dict[str, bytes]], sentence: str) -> Any:
    return pytest.param(change, sentence, id=name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        broken(
            "key",
            lambda m: {k: v for k, v in m.items() if k != "noise.npy"},
            "has no noise.npy beside image.jpg: each",
        ),
        broken("shape", lambda m: m | {"noise.npy": npy(np.zeros((4, 8, 4), "f4"))}, "has the shape [4, 8, 4], and"),
        broken("flat", lambda m: m | {"noise.npy": npy(np.zeros(9, "f4"))}, "shape [9]: latents are [channels, height"),
        broken("whole", lambda m: m | {"noise.npy": npy(np.zeros((4, 8, 8), int))}, "holds int64: store float16"),
        broken("pickle", lambda m: m | {"noise.npy": npy(np.array([[[{}]]]))}, "holds object: store float16"),
        broken("text", lambda m: m | {"noise.npy": b"noise"}, "noise.npy is not an array of numpy"),
        broken("version", lambda m: m | {"noise.npy": b"\x93NUMPY\2\0" + b"x" * 99}, "in a .npy file of version 1.0"),
        broken("short", lambda m: m | {"noise.npy": m["noise.npy"][:-4]}, "does not have the size that it states"),
        broken("prompt", lambda m: m | {"prompt.txt": b"x" * 50_000}, "has 50000 bytes, more than 40000: shorten it"),
        broken("meta", lambda m: m | {"meta.json": b"[1"}, "meta.json is not JSON"),
        broken("long meta", lambda m: m | {"meta.json": b"1" * 70_000}, "has 70000 bytes, more than 65536"),
        broken("header", lambda m: m | {"noise.npy": m["noise.npy"][:20]}, "in a .npy file of version 1.0"),
        broken("dot", lambda m: {f"x.{k}": v for k, v in m.items()}, "behind a key without a dot, one after the other"),
        broken("parent", lambda m: m | {"a/../../x": b""}, "leaves the folder of the tar"),
    ],
)
def test_shard_that_cannot_be_used_is_refused(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], sentence: str, tmp_path: Path
) -> None:
    path = published(tmp_path / "bad.tar", change(published_members()), count=2)
    with pytest.raises(DatasetError) as caught:
        read_shard(path)
    message = str(caught.value)
    assert sentence in message and message.startswith(str(path)) and "\n" not in message


def test_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "bad.tar", published_members(), count=1)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("000000000.prompt.txt"))
    with pytest.raises(DatasetError, match=r"000000000\.prompt\.txt is there twice"):
        read_shard(path)


def test_prompt_that_is_not_utf8_is_refused_when_it_is_read(tmp_path: Path) -> None:
    shard = read_shard(published(tmp_path / "a.tar", published_members() | {"prompt.txt": b"\xff"}))
    with pytest.raises(DatasetError, match=r"a\.tar: prompt\.txt of pair 000000001 is not UTF-8 text"):
        shard.read(1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r._replace(latents=r.latents + np.float16("inf")), "image_latent.npy of pair 000000000 holds NaN"),
        (lambda r: r._replace(noise=r.noise * np.nan), "noise.npy of pair 000000000 holds NaN"),
        (lambda r: r._replace(noise=r.noise * 2), "the noise is not from N(0, 1): its deviation is"),
    ],
)
def test_bad_pair_is_never_written(
    change: Callable[[PairRecord], PairRecord], sentence: str, write_pairs: Write, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as caught:
        write_pairs(tmp_path / "000000.tar", change=change)
    assert sentence in str(caught.value) and os.listdir(tmp_path) == []


def test_missing_pair_is_noticed_before_the_shard_gets_its_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float32)
    with pytest.raises(DatasetError, match="1 of 2 pairs were written"):
        write_shard(tmp_path / "0.tar", [PairRecord("0", noise, noise, "a", {})], 2)
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_and_leaves_nothing(
    write_pairs: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(RefusedInputError, match="the disk is full"):
        write_pairs(tmp_path / "000000.tar")
    assert os.listdir(tmp_path) == []


def test_key_that_comes_back_after_another_pair_is_refused(tmp_path: Path) -> None:
    path, members = tmp_path / "0.tar", published_members()
    with tarfile.open(path, "w") as tar:
        for key in ("a", "b", "a"):
            for name, content in members.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DatasetError, match=r"0\.tar: a is there twice"):
        read_shard(path)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    members, path = published_members(), tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in ((".DS_Store", b""), *members.items()):
            for own in (f"._{name}", f"0.{name}") if name in members else (name,):
                member = tarfile.TarInfo(own)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert len(read_shard(path)) == 1


def test_what_all_pairs_say_of_their_making_is_kept_once(write_pairs: Write, tmp_path: Path) -> None:
    metas = iter([{"model": "a", "seed": 1}, {"model": "a", "seed": 2}, {"model": "b", "x": "y" * 600}])
    path = write_pairs(tmp_path / "0.tar", 3, change=lambda record: record._replace(meta=next(metas)))
    shard = read_shard(path)
    assert shard.kinds == [{"model": "a"}, {"model": "b"}] and shard.meta == {"model": "a", "seed": 1}
    assert [shard.key(i) for i in range(3)] == ["0000", "0001", "0002"]
