"""The record of a folder of pairs: which other record is refused, before the model is loaded and after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.tasks import pair_record as pair_record_module
from d2f_fast.tasks.pair_record import check_record, pair_record, prompt_entries, settle_record
from d2f_fast.tasks.pairs import PairPlan
from d2f_fast.tasks.processes import Process

MakePlan = Callable[..., PairPlan]


@pytest.fixture
def settled(make_plan: MakePlan, tmp_path: Path) -> Path:
    """Folder with the record of the default plan and a model named "m"."""
    settle_record(tmp_path, pair_record(make_plan(), {"model": "m"}, {}), Process())
    return tmp_path


def test_known_entries_alone_are_compared_before_the_model_is_loaded(settled: Path, make_plan: MakePlan) -> None:
    known = {"seed": 0, "guidance_scale": 3, **prompt_entries(make_plan().prompts), "shift": None}
    check_record(settled, known)
    check_record(settled / "none", known)
    for change, sentence in (
        ({"seed": 2}, "seed was 0 and is now 2: give the same options as before to go on, or name a new output_dir"),
        (prompt_entries(["ab", "c", "dx"]), "prompts_sha256 was "),
        ({"shift": 2.0}, r"shift was null and is now 2\.0"),
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
    record = pair_record(make_plan(**options), {"model": "m"}, {})
    for process in (Process(), Process(1, 2)):
        with pytest.raises(RefusedInputError) as caught:
            settle_record(settled, record, process)
        assert sentence in str(caught.value) and "give the same options as before to go on" in str(caught.value)


def test_other_model_is_refused_by_its_hash(settled: Path, make_plan: MakePlan) -> None:
    with pytest.raises(RefusedInputError, match='model was "m" and is now "n"'):
        settle_record(settled, pair_record(make_plan(), {"model": "n"}, {}), Process())


def test_shards_without_a_record_are_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "000000.tar").touch()
    for refuse in (
        lambda: settle_record(tmp_path, pair_record(make_plan(), {}, {}), Process()),
        lambda: check_record(tmp_path, {"seed": 0}),
    ):
        with pytest.raises(RefusedInputError, match=r"holds shards and no pairs\.json"):
            refuse()
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(RefusedInputError, match="does not describe pairs"):
        settle_record(tmp_path, pair_record(make_plan(), {}, {}), Process())


def test_process_whose_main_process_never_writes_gives_up(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_record_module, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(RefusedInputError, match="start all processes together"):
        settle_record(tmp_path, pair_record(make_plan(), {}, {}), Process(1, 2))
