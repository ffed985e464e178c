"""A demo that is stopped keeps what is finished, and goes on to the same results."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from d2f_fast.demo import run as demo_run
from d2f_fast.demo.kept_parts import FOLDER, KeptParts
from d2f_fast.demo.measurements import Measurements
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.errors import RefusedInputError
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.stopping import StopRequestedError

SMALL = DemoSettings(curve_points=(0, 2), batch_size=2, rank=2)
MEASURES = ("same_images", "few_steps", "training", "style")


class _Images:
    """Four captioned images."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.new("RGB", (32, 32), (index * 60, 9, 99)), "text": "abc"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace each measurement by the sum of the network's weights, and return the list of those that were taken.

    A demo is stopped by the measurement whose name the list begins with.
    """
    calls = [""]

    def replaced(measure: str) -> Callable[..., None]:
        def take(self: Measurements, model: Any, *more: Any) -> None:
            network = next((word for word in more if isinstance(word, str)), "base")
            calls.append(f"{measure} {network}")
            if calls[-1] == calls[0]:
                raise StopRequestedError(signal.SIGINT)
            total = sum(weight.sum() for weight in model.unet.parameters()).item()
            self.rows.append({"section": "style", "network": network, "frechet_distance": total})
            self.shown["style", network, MEASURES.index(measure)] = torch.full((1, 3, 32, 32), 0.5)
            self.progress.update(10)

        return take

    for measure in MEASURES:
        monkeypatch.setattr(Measurements, f"measure_{measure}", replaced(measure))
    monkeypatch.setattr(demo_run, "_evaluation_sets", lambda *given: [SimpleNamespace()] * 3)
    monkeypatch.setattr(demo_run, "EmojiDataset", lambda *given: _Images())
    monkeypatch.setattr(demo_run, "CONTINUED", {"diff2flow": demo_run.CONTINUED["diff2flow"]})
    monkeypatch.setattr(
        demo_run, "write_report", lambda folder, found, seconds: (folder / "shown").write_text(f"{len(found.shown)}")
    )
    return calls


def test_stopped_demo_goes_on_to_the_results_of_one_that_was_not(
    load: Callable[[], Any],
    tmp_path: Path,
    measured: list[str],
    capsys: pytest.CaptureFixture[str],
    adapted: tuple[Any, dict[str, Path]],
) -> None:
    lora = adapted[1]["kohya"]
    measured[:] = ["style style"]
    words = r"^stopped by SIGINT; 6 parts are finished in .*unfinished: the same command goes on from them$"
    with pytest.raises(StopRequestedError, match=words):
        demo_run.run_demo(tmp_path / "stopped", 3, SMALL, load, Any, lora)
    measured[:] = [""]
    demo_run.run_demo(tmp_path / "stopped", 3, SMALL, load, Any, lora)
    assert measured[1:] == ["style style"]
    assert "d2f: going on with an unfinished demo: 6 parts are finished in " in capsys.readouterr().err
    measured[:] = [""]
    demo_run.run_demo(tmp_path / "whole", 3, SMALL, load, Any, lora)
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "stopped")]
    assert found[0]["results"] == found[1]["results"]
    for file in (f"style/{LORA_FILE}", "shown"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()
    assert not (tmp_path / "stopped" / FOLDER).exists()


def test_parts_of_another_demo_are_refused_with_the_setting_that_differs(tmp_path: Path) -> None:
    KeptParts(tmp_path, {"seed": 0, "rank": 4})
    KeptParts(tmp_path, {"seed": 0, "rank": 4})
    with pytest.raises(RefusedInputError, match=r"unfinished demo with another seed \(0, not 1\): remove it, or name"):
        KeptParts(tmp_path, {"seed": 1, "rank": 4})


def test_damaged_part_is_done_again(tmp_path: Path) -> None:
    measurements = Measurements(DemoSettings(), *[SimpleNamespace()] * 3, 0, tqdm(disable=True))  # type: ignore[arg-type]
    parts, done = KeptParts(tmp_path, {}), []

    def measure() -> None:
        done.append(1)
        measurements.rows.append({"section": "style"})

    for damage in (False, False, True):
        if damage:
            (parts.folder / "one.safetensors").write_bytes(b"not a safetensors file")
        parts.measure("one", measurements, measure)
    assert len(done) == 2
    assert measurements.rows == [{"section": "style"}] * 3
