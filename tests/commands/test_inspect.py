"""`d2f inspect` of each kind of path, as a table and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.commands import kind
from d2f_fast.commands.main import main


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], dict[str, Any]]:
    """Function that runs the command with --json, and returns the description."""

    def run(path: Path) -> dict[str, Any]:
        assert main(["inspect", str(path), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return run


def test_model_folder_is_described_as_a_table(tiny_folder: Path, capsys: Any) -> None:
    assert main(["inspect", str(tiny_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny_folder}: diffusers folder (StableDiffusionPipeline)"
    assert "  prediction type: epsilon (scheduler_config.json)" in lines
    assert any(line.startswith("    unet: ") for line in lines)
    assert any(line.startswith("  bytes: ") and line.endswith("kB") for line in lines)


def test_lora_data_set_and_unknown_file_are_described(adapted: Any, images: Path, tmp_path: Path, inspect: Any) -> None:
    assert inspect(adapted[1]["peft"])["names"] == "peft"
    assert inspect(images)["images"] == 3
    save_file({"weight": torch.ones(3)}, tmp_path / "a.safetensors")
    found = inspect(tmp_path / "a.safetensors")
    assert found["kind"] == "safetensors file of another kind" and found["output"] == str(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    assert inspect(tmp_path / "empty.safetensors")["odd"] == ["it holds no tensors"]


def test_long_value_is_cut_in_the_table(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "lora.safetensors"
    layer = {f"unet.conv_in.lora_{part}.weight": torch.ones(1, 1, 1, 1) for part in "AB"}
    save_file(layer, path, {"modelspec.thumbnail": "a" * 5000})
    assert main(["inspect", str(path)]) == 0
    assert f"{'a' * 300}… (5,000 letters)" in capsys.readouterr().out


def test_run_is_described_with_its_results(train: Any, tmp_path: Path, inspect: Any, capsys: Any) -> None:
    assert train(tmp_path / "run", "--checkpointing_steps", "1") == 0
    capsys.readouterr()
    found = inspect(tmp_path / "run")
    assert found["kind"] == "run" and found["command"].startswith("d2f train, seed ")
    assert found["last logged step"].startswith("2, loss ")
    assert Path(found["base model"]).is_dir() and Path(found["images"]).is_dir()
    checkpoint = inspect(tmp_path / "run" / "checkpoint-1")
    assert (checkpoint["kind"], checkpoint["step"]) == ("checkpoint of a run", 1)
    assert [result["names"] for result in checkpoint["results"].values()] == ["peft"]
    assert "checkpoint-1" in found["checkpoints"] and found["odd"] == found["needs"] == []
    assert [result["names"] for result in found["results"].values()] == ["peft", "kohya, diffusers blocks"]
    (tmp_path / "run" / "checkpoint-1" / "manifest.json").unlink()
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.unlink()
    odd = inspect(tmp_path / "run")["odd"]
    assert odd[0] == "checkpoint-1: no manifest, so that it is not resumed from" and "no result yet" in odd[1]
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "  last logged step: 2, loss " in capsys.readouterr().out


def test_tree_of_many_files_is_not_walked_to_its_end(
    tmp_path: Path, images: Path, inspect: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        (tmp_path / "tree" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / "a" / f"{number}.txt").touch()
    (tmp_path / "tree" / "b").mkdir()
    (tmp_path / "tree" / "b" / "late.png").touch()
    monkeypatch.setattr(kind, "_MOST_FILES", 5)
    assert main(["inspect", str(tmp_path / "tree")]) == 2
    assert "nor images among its first 5 files: check the path" in capsys.readouterr().err
    monkeypatch.setattr("d2f_fast.files.walk.MOST_FILES", 4)
    monkeypatch.setattr("d2f_fast.data.describe.MOST_FILES", 4)
    monkeypatch.setattr("d2f_fast.data.describe._MOST_HEADERS", 1)
    found = inspect(images)
    assert found["images"] == 2
    assert "only the first 4 files were looked at" in found["odd"]
    assert "only the sizes of the first 1 images were read" in found["odd"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none: no such file or folder; check the path"),
        ("a.ckpt", "a.ckpt is a pickle, which can run code: convert it to safetensors first"),
        ("cut.safetensors", "cut.safetensors: not an intact safetensors file"),
        ("empty", "empty holds neither a model, a LoRA, a cache, a run, pairs, an export nor images"),
    ],
)
def test_path_that_cannot_be_described_is_refused(
    name: str, message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.ckpt").write_bytes(b"\x80\x02")
    Path("cut.safetensors").write_bytes(b"\xff" * 20)
    Path("empty").mkdir()
    assert main(["inspect", name]) == 2
    assert capsys.readouterr().err.startswith(f"d2f: {message}")
