"""The data set of pairs: its sources, its index, and pairs that do not belong together."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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
    assert abs(dataset.latents_deviation - np.concatenate([p.latents for p in expected[:3]]).std()) < 1e-3


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
        (("no.tar",), "no.tar: there is no such shard"),
        (("{0..2}.tar",), "2.tar: there is no such shard"),
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


def test_noise_of_another_scale_is_refused(write_pairs: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2f_fast.data.pair_shards import Moments

    with monkeypatch.context() as unchecked:
        unchecked.setattr(Moments, "difference_from_normal", lambda self: None)
        write_pairs(tmp_path / "0.tar", change=lambda record: record._replace(noise=record.noise * 14))
    with pytest.raises(DatasetError, match=r"0\.tar: the noise is not from N\(0, 1\), as pairs need: its deviation"):
        PairDataset([tmp_path])


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
    shard = write_pairs(tmp_path / "many" / "0.tar", 10_000, (4, 4, 4))
    for i in range(1, 10):
        os.link(shard, shard.with_name(f"{i}.tar"))
    peaks = {}
    for name in ("few", "many"):
        command = [sys.executable, "-c", READ, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pairs, peak = map(int, done.stdout.split())
        peaks[pairs] = peak
    assert peaks.keys() == {1000, 100_000}
    assert peaks[100_000] - peaks[1000] <= 100e6, peaks
