"""A folder of pairs: what goes on, what is refused, and how processes divide it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from d2f_fast.data.pair_shards import PairRecord
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.stopping import StopRequestedError
from d2f_fast.tasks import pair_folder
from d2f_fast.tasks.pair_folder import PairFolder
from d2f_fast.tasks.pair_record import pair_record, settle_record
from d2f_fast.tasks.pairs import PairGenerator, PairPlan
from d2f_fast.tasks.processes import Process, owned_folder

MakePlan = Callable[..., PairPlan]
MakeGenerator = Callable[..., PairGenerator]
SHAPE = (4, 8, 8)
ORIGIN = {"model": "m"}  # that of `make_generator`


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill(folder: Path, generator: PairGenerator, plan: PairPlan, process: Process = Process()) -> int:  # noqa: B008
    """Make the pairs of one process as the command does, and return how many it made."""
    with owned_folder(folder, process):
        settle_record(folder, pair_record(plan, ORIGIN, Diff2FlowScheduler().config), process)
        filled = PairFolder(folder, plan, process, ORIGIN)
        made = filled.fill(generator.shard)
        filled.write_grid(generator)
        return made


class Filled(NamedTuple):
    """A finished folder, its plan, and a generator that makes the same."""

    folder: Path
    plan: PairPlan
    generator: PairGenerator


@pytest.fixture(scope="module")
def filled(make_plan: MakePlan, make_generator: MakeGenerator, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    folder = tmp_path_factory.mktemp("pairs") / "whole"
    plan, generator = make_plan(), make_generator()
    assert fill(folder, generator, plan) == 10
    return Filled(folder, plan, generator)


def test_folder_holds_the_shards_their_record_and_a_grid(filled: Filled) -> None:
    assert sorted(contents(filled.folder)) == ["000000.tar", "000001.tar", "000002.tar", "grid.png", "pairs.json"]
    assert len(PairDataset([filled.folder])) == 10


def test_folder_of_two_processes_is_equal_byte_for_byte(filled: Filled, tmp_path: Path) -> None:
    # Process 0 is the one that writes pairs.json, for which the other one waits.
    assert fill(tmp_path / "two", filled.generator, filled.plan, Process(0, 2)) == 6
    assert fill(tmp_path / "two", filled.generator, filled.plan, Process(1, 2)) == 4
    assert contents(tmp_path / "two") == contents(filled.folder)


def test_killed_run_goes_on_without_writing_finished_shards_again(filled: Filled, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("000001.tar", "pairs.json"):
        (folder / name).write_bytes((filled.folder / name).read_bytes())
    # What two killed processes leave: locks, and files under temporary names.
    for name in (".lock", ".lock-process-1", ".tmp-12345678-000000.tar", ".tmp-1-grid.png", ".tmp-2-pairs.json"):
        (folder / name).write_text("x")
    (folder / ".tmp-2-pairs.json").unlink()
    before = (folder / "000001.tar").stat()
    assert fill(folder, filled.generator, filled.plan) == 6
    assert contents(folder) == contents(filled.folder)
    after = (folder / "000001.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert fill(folder, filled.generator, filled.plan) == 0


def test_process_leaves_unfinished_files_of_the_others_alone(filled: Filled, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in (0, 1):
        (folder / f".tmp-12345678-00000{number}.tar").touch()
    PairFolder(folder, filled.plan, Process(1, 2), ORIGIN)
    assert os.listdir(folder) == [".tmp-12345678-000000.tar"]


def test_stop_says_how_much_is_finished_and_leaves_no_half_shard(
    filled: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(number: int) -> Iterator[PairRecord]:
        pairs = filled.generator.shard(number)
        yield next(pairs)
        if number == 1:
            raise StopRequestedError(15)
        yield from pairs

    with pytest.raises(StopRequestedError):
        PairFolder(tmp_path, filled.plan, Process(), ORIGIN).fill(stopped)
    assert "d2f: 1 of 3 shards are finished: the same command makes the others" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["000000.tar"]


@pytest.mark.parametrize("cut", [0, 700, 1024])
def test_finished_shard_that_was_cut_is_refused(cut: int, filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "000002.tar").write_bytes((filled.folder / "000002.tar").read_bytes()[:cut])
    with pytest.raises(RefusedInputError, match=r"000002\.tar is damaged, or holds other pairs: remove it, and"):
        PairFolder(tmp_path, filled.plan, Process(), ORIGIN)


@pytest.mark.parametrize("of_shard", [0, 2, None], ids=["other pairs", "fewer pairs", "pipe"])
def test_file_that_is_not_the_shard_of_its_name_is_refused(
    of_shard: int | None, filled: Filled, tmp_path: Path
) -> None:
    path = tmp_path / "000001.tar"
    if of_shard is None:
        os.mkfifo(path)
    else:
        shutil.copy(filled.folder / f"00000{of_shard}.tar", path)
    with pytest.raises(RefusedInputError, match=r"000001\.tar is damaged, or holds other pairs: remove it, and run"):
        PairFolder(tmp_path, filled.plan, Process(), ORIGIN)


@pytest.mark.parametrize("change", [{"guidance_scale": 4.0}, {"solver": "heun"}, {"height": 24}], ids=str)
def test_shard_of_other_options_is_refused_though_its_seed_is_the_same(
    change: dict[str, Any], filled: Filled, make_plan: MakePlan, tmp_path: Path
) -> None:
    shutil.copy(filled.folder / "000001.tar", tmp_path)
    PairFolder(tmp_path, make_plan(), Process(), ORIGIN)
    for plan, origin in ((make_plan(**change), ORIGIN), (make_plan(), {"model": "n"})):
        with pytest.raises(RefusedInputError, match=r"000001\.tar is damaged, or holds other pairs"):
            PairFolder(tmp_path, plan, Process(), origin)


def test_grid_is_made_again_with_the_first_shard(filled: Filled, tmp_path: Path) -> None:
    for name in ("000001.tar", "000002.tar"):
        shutil.copy(filled.folder / name, tmp_path)
    (tmp_path / "grid.png").write_bytes(b"of other pairs")
    PairFolder(tmp_path, filled.plan, Process(1, 2), ORIGIN)
    assert (tmp_path / "grid.png").exists()  # Process 0 alone writes and removes it.
    PairFolder(tmp_path, filled.plan, Process(), ORIGIN)
    assert not (tmp_path / "grid.png").exists()


def test_disk_that_is_too_small_is_refused_before_anything_is_made(
    filled: Filled, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(num_pairs=400, pairs_per_shard=100)
    folder = PairFolder(tmp_path, plan, Process(), ORIGIN)
    said = folder.check_disk(SHAPE)
    needed = float(said.split(" MiB")[0])
    made = sum(path.stat().st_size for path in filled.folder.glob("*.tar")) / 10
    assert 0.5 < needed * 2**20 / 400 / made < 1.2 and "free" in said
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(pair_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RefusedInputError, match=r"are needed, and 1\.0 MiB are free: make room, or give fewer"):
        folder.check_disk(SHAPE)
    folder.missing.remove(0)  # With a shard, the options are settled.
    with pytest.raises(RefusedInputError, match=r"1\.0 MiB are free: make room, or give another output_dir"):
        folder.check_disk(SHAPE)
