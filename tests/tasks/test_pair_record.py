"""The record of a folder of pairs: which other record is refused, before the model is loaded and after it."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.tasks import pair_record as pair_record_module
from d2f_fast.tasks.pair_record import check_record, pair_record, prompt_entries, settle_record
from d2f_fast.tasks.pairs import PairPlan
from d2f_fast.tasks.processes import Process

MakePlan = Callable[..., PairPlan]


SCHEDULE = Diff2FlowScheduler().config


@pytest.fixture
def settled(make_plan: MakePlan, tmp_path: Path) -> Path:
    """Folder with a shard, and with the record of the default plan and a model named "m"."""
    settle_record(tmp_path, pair_record(make_plan(), {"model": "m"}, SCHEDULE), Process())
    (tmp_path / "000000.tar").touch()
    return tmp_path


def test_known_entries_alone_are_compared_before_the_model_is_loaded(settled: Path, make_plan: MakePlan) -> None:
    known = {"seed": 0, "guidance_scale": 3, **prompt_entries(make_plan().prompts), "shift": 1.0}
    check_record(settled, known)
    check_record(settled / "none", known)
    for change, sentence in (
        ({"seed": 2}, "seed was 0 and is now 2: give the same options and the same model"),
        (prompt_entries(["ab", "c", "dx"]), "prompts_sha256 was "),
        ({"shift": 2.0}, r"shift was 1\.0 and is now 2\.0"),
    ):
        with pytest.raises(RefusedInputError, match=sentence):
            check_record(settled, known | change)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"guidance_scale": 4.0}, "guidance_scale was 3.0 and is now 4.0"),
        ({"prompts": ("ab", "c", "dx")}, "prompts_sha256 was "),
        ({"num_pairs": 11}, "num_pairs was 10 and is now 11"),
        ({"solver": "heun"}, 'solver was "euler" and is now "heun"'),
    ],
    ids=str,
)
def test_folder_of_other_options_is_refused_with_the_key(
    options: dict[str, Any], sentence: str, settled: Path, make_plan: MakePlan
) -> None:
    record = pair_record(make_plan(**options), {"model": "m"}, SCHEDULE)
    for process in (Process(), Process(1, 2)):
        with pytest.raises(RefusedInputError) as caught:
            settle_record(settled, record, process)
        assert sentence in str(caught.value) and "give the same options and the same model as before" in str(
            caught.value
        )


def test_other_model_is_refused_by_its_hash(settled: Path, make_plan: MakePlan) -> None:
    with pytest.raises(RefusedInputError, match='model was "m" and is now "n"'):
        settle_record(settled, pair_record(make_plan(), {"model": "n"}, SCHEDULE), Process())


@pytest.mark.parametrize(
    "changed",
    [
        {"beta_schedule": "linear"},
        {"prediction_type": "v_prediction"},
        {"trained_betas": [1e-4 * i for i in range(1, 999)]},
    ],
    ids=str,
)
def test_other_schedule_is_refused(changed: dict[str, object], settled: Path, make_plan: MakePlan) -> None:
    record = pair_record(make_plan(), {"model": "m"}, SCHEDULE | changed)
    with pytest.raises(RefusedInputError) as caught:
        settle_record(settled, record, Process())
    assert f"{next(iter(changed))} was " in str(caught.value) and len(str(caught.value)) < 500


def test_record_without_a_finished_shard_is_replaced(settled: Path, make_plan: MakePlan) -> None:
    (settled / "000000.tar").rename(settled / ".tmp-1-000000.tar")  # What a killed run leaves is no finished shard.
    wanted = pair_record(make_plan(num_pairs=3), {"model": "n"}, SCHEDULE)
    check_record(settled, {"num_pairs": 3})
    settle_record(settled, wanted, Process())
    assert json.loads((settled / "pairs.json").read_text())["num_pairs"] == 3


def test_other_process_waits_until_the_record_is_replaced(settled: Path, make_plan: MakePlan) -> None:
    (settled / "000000.tar").unlink()
    wanted = pair_record(make_plan(num_pairs=3), {"model": "n"}, SCHEDULE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(settle_record, settled, wanted, Process(1, 2))
        time.sleep(0.3)
        assert not waiting.done()
        settle_record(settled, wanted, Process(0, 2))
        waiting.result(timeout=10)


def test_shards_without_a_record_are_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "000000.tar").touch()
    for refuse in (
        lambda: settle_record(tmp_path, pair_record(make_plan(), {}, SCHEDULE), Process()),
        lambda: check_record(tmp_path, {"seed": 0}),
    ):
        with pytest.raises(RefusedInputError, match=r"holds shards and no pairs\.json"):
            refuse()
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(RefusedInputError, match="does not describe pairs"):
        settle_record(tmp_path, pair_record(make_plan(), {}, SCHEDULE), Process())


def test_process_whose_main_process_never_writes_gives_up(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_record_module, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(RefusedInputError, match="start all processes together"):
        settle_record(tmp_path, pair_record(make_plan(), {}, SCHEDULE), Process(1, 2))
