"""The data set of pairs: its sources, its index, and pairs that do not belong together."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2f_fast.data.moments import Moments
from d2f_fast.data.pair_shards import read_shard
from d2f_fast.data.pairs import PairDataset, shard_paths
from d2f_fast.errors import DatasetError

Write = Callable[..., Path]


def test_pairs_are_those_of_all_shards_in_their_order(write_pairs: Write, tmp_path: Path) -> None:
    paths = [write_pairs(tmp_path / f"{i:06d}.tar", count) for i, count in enumerate((3, 1, 4))]
    (tmp_path / ".tmp-1234-000003.tar").touch()
    dataset = PairDataset([tmp_path])
    assert len(dataset) == 8 and dataset.shape == (4, 8, 8)
    expected = [shard.read(i) for shard in map(read_shard, paths) for i in range(len(shard))]
    for i, pair in enumerate(expected):
        assert np.array_equal(dataset[i].latents, pair.latents) and np.array_equal(dataset[i].noise, pair.noise)
        assert dataset[i].prompt == dataset.prompt(i) == pair.prompt
    for i in (-1, 8):
        with pytest.raises(IndexError):
            dataset[i]
    deviations = [
        np.concatenate([p.latents for p in part]).std() for part in (expected[:3], expected[3:4], expected[4:])
    ]
    assert np.allclose(dataset.latents_deviations, deviations, atol=1e-3)
    assert dataset.place(5) == f"{paths[2]}: pair 000002001"


def test_folders_files_and_ranges_name_the_shards(write_pairs: Write, tmp_path: Path) -> None:
    for i in range(11):
        (tmp_path / f"{i:03d}.tar").touch()
        (tmp_path / f"x{i}-a.tar").touch()

    def names(*sources: str) -> list[str]:
        return [path.name for path in shard_paths([tmp_path / source for source in sources])]

    assert names("{008..010}.tar") == ["008.tar", "009.tar", "010.tar"]
    assert names("x{8..10}-a.tar", "001.tar") == ["x8-a.tar", "x9-a.tar", "x10-a.tar", "001.tar"]
    assert names("{0..0}{0..0}{1..2}.tar") == ["001.tar", "002.tar"]
    assert len(names("")) == 22
    (tmp_path / "{000..001}.tar").touch()
    assert names("{000..001}.tar") == ["{000..001}.tar"]  # A file of this name is that file.


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ((), "pairs: give a folder of shards, or tar files"),
        (("empty",), "empty holds no shards *.tar: give the folder that d2f pairs wrote"),
        (("no.tar",), "no.tar: there is no such folder or shard"),
        (("folder",), "1.tar is not an ordinary file: move it away, or name the shards"),
        (("{0..2}.tar",), "2.tar: there is no such folder or shard"),
        (("{2..1}.tar",), "the range 2..1 has no numbers, or too many"),
        (("{0..99999999}.tar",), "has no numbers, or too many"),
        (("0.tar", "{0..1}.tar"), "0.tar is named twice"),
    ],
)
def test_sources_without_shards_are_refused(
    sources: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("folder/1.tar").mkdir(parents=True)
    Path("0.tar").touch()
    Path("1.tar").touch()
    with pytest.raises(DatasetError) as caught:
        shard_paths(sources)
    assert sentence in str(caught.value)


def test_shards_of_two_sizes_are_refused(write_pairs: Write, tmp_path: Path) -> None:
    write_pairs(tmp_path / "0.tar", shape=(4, 8, 8))
    write_pairs(tmp_path / "1.tar", shape=(4, 8, 16))
    with pytest.raises(DatasetError, match=r"1\.tar has latents of \[4, 8, 16\], and .*0\.tar of \[4, 8, 8\]: train"):
        PairDataset([tmp_path])


@pytest.mark.parametrize("bad", ["0.tar", "1.tar"])
def test_noise_of_another_scale_is_refused_in_every_shard(
    bad: str, write_pairs: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0.tar", "1.tar"):
        with monkeypatch.context() as unchecked:
            unchecked.setattr(Moments, "difference_from_normal", lambda self: None)
            factor = 3 if name == bad else 1
            write_pairs(tmp_path / name, 100, change=lambda record, by=factor: record._replace(noise=record.noise * by))
    sentence = rf"{bad}: the noise is not from N\(0, 1\), as pairs need: its deviation is [23]\.\d+ and not 1"
    with pytest.raises(DatasetError, match=sentence):
        PairDataset([tmp_path])


@pytest.mark.parametrize(("position", "field"), [(0, "noise"), (9, "latents")])
def test_pair_that_is_not_finite_is_named_where_it_is_looked_at(
    position: int, field: str, write_pairs: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2f_fast.data.pair_shards._check_finite", lambda pair, path: None)
    monkeypatch.setattr(Moments, "difference_from_normal", lambda self: None)
    key = f"1{position:03d}"
    damage = {field: np.full((4, 8, 8), np.inf, np.float16)}
    write_pairs(tmp_path / "0.tar")
    write_pairs(tmp_path / "1.tar", 10, change=lambda pair: pair._replace(**damage) if pair.key == key else pair)
    name = {"noise": "noise.npy", "latents": "image_latent.npy"}[field]
    with pytest.raises(DatasetError, match=rf"1\.tar: {name} of pair {key} holds NaN or infinity: make"):
        PairDataset([tmp_path])


def test_copy_of_a_shard_is_refused(write_pairs: Write, tmp_path: Path) -> None:
    shutil.copy(write_pairs(tmp_path / "0.tar"), tmp_path / "copy.tar")
    with pytest.raises(DatasetError, match=r"copy\.tar and .*0\.tar hold the same pairs: keep one of the two"):
        PairDataset([tmp_path])


def test_fingerprint_is_that_of_the_pairs_wherever_they_are(write_pairs: Write, tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        write_pairs(tmp_path / "a" / name)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole, moved = (PairDataset([tmp_path / name]).settings() for name in "ab")
    assert whole == moved
    for sources in (["a/0.tar"], ["a/1.tar", "a/0.tar"]):
        assert PairDataset([tmp_path / each for each in sources]).settings() != whole


def test_entries_of_all_pairs_are_common_only_where_each_pair_has_them(write_pairs: Write, tmp_path: Path) -> None:
    metas = iter([{"steps": 4, "solver": "euler"}] * 5 + [{"steps": 4, "solver": "heun"}])
    write_pairs(tmp_path / "0.tar", change=lambda pair: pair._replace(meta=next(metas)))
    dataset = PairDataset([tmp_path])
    assert dataset.common_meta("steps") == 4 and dataset.common_meta("solver") is None


def test_files_that_are_not_read_and_missing_pairs_are_named(write_pairs: Write, tmp_path: Path) -> None:
    write_pairs(tmp_path / "0.TAR")
    (tmp_path / "pairs.json").write_text(json.dumps({"num_pairs": 6}))
    assert PairDataset([tmp_path]).doubts == []  # Capital letters are no reason to pass a shard over.
    (tmp_path / "pairs.json").write_text(json.dumps({"num_pairs": 20}))
    (tmp_path / "1.tar.gz").touch()
    write_pairs(tmp_path / "more" / "2.tar")
    unread, missing = PairDataset([tmp_path]).doubts
    assert unread.startswith(f"{tmp_path / '1.tar.gz'} and 1 more are not read: only uncompressed files *.tar in")
    assert missing.startswith(f"{tmp_path} holds 6 pairs, and its pairs.json names 20: the same d2f pairs command")
    (tmp_path / "pairs.json").unlink()
    os.mkfifo(tmp_path / "pairs.json")
    assert PairDataset([tmp_path]).doubts == [unread]
    (tmp_path / "pairs.json").unlink()
    for content in ("[]", "no JSON", '{"num_pairs": null}'):
        (tmp_path / "pairs.json").write_text(content)
        assert len(PairDataset([tmp_path]).doubts) == (2 if "null" in content else 1)


def test_index_takes_32_bytes_for_each_pair(write_pairs: Write, tmp_path: Path) -> None:
    for i in range(2):
        write_pairs(tmp_path / f"{i}.tar", 50)
    assert sum(shard.index_bytes for shard in PairDataset([tmp_path]).shards) == 100 * 32


READ = """
import random, sys
from itertools import islice
from d2f_fast.data.order import plan_batches
from d2f_fast.data.pairs import PairDataset
from d2f_fast.files.memory import peak_resident_bytes

dataset = PairDataset([sys.argv[1]])
for plan in islice(plan_batches(len(dataset), 8, seed=0), 250):
    for index in plan.index:
        dataset[index]
for _ in range(2000):
    dataset[random.randrange(len(dataset))]
print(len(dataset), peak_resident_bytes())
"""


@pytest.mark.slow
def test_memory_of_100000_pairs_is_within_100_mb_of_that_of_1000(write_pairs: Write, tmp_path: Path) -> None:
    write_pairs(tmp_path / "few" / "0.tar", 1000, (4, 4, 4))
    for i in range(10):
        write_pairs(tmp_path / "many" / f"{i}.tar", 10_000, (4, 4, 4))
    peaks = {}
    for name in ("few", "many"):
        command = [sys.executable, "-c", READ, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pairs, peak = map(int, done.stdout.split())
        peaks[pairs] = peak
    assert peaks.keys() == {1000, 100_000}
    assert peaks[100_000] - peaks[1000] <= 100e6, peaks
