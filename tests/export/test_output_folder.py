"""What may be replaced, and what a killed run leaves to the next."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import RefusedInputError
from d2f_fast.export import staging
from d2f_fast.export.to_onnx import main


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    dead, own, other = (
        tmp_path / f".tmp-{name}" for name in ("999999999-out", f"{os.getppid()}-out", "999999999-a-out")
    )
    for path in (dead, own, other):
        path.mkdir()
    staging.recover(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([own, other])


def test_what_another_users_run_is_making_stays(tmp_path, monkeypatch):
    def forbidden(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    (tmp_path / ".tmp-1-out").mkdir()
    staging.recover(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-1-out"]


@pytest.mark.parametrize("finished", [False, True])
def test_export_that_a_killed_run_was_replacing_comes_back(finished, tmp_path):
    # Killed between its two renames, or after them.
    (tmp_path / ".old-999999999-out").mkdir()
    (tmp_path / ".old-999999999-out/export.json").write_text("old")
    if finished:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/export.json").write_text("new")
    staging.recover(tmp_path / "out")
    assert (tmp_path / "out/export.json").read_text() == ("new" if finished else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (".", "here is the current folder, or holds it: name a new folder"),
        ("..", "is the current folder, or holds it: name a new folder"),
        ("/proc", "output /proc is a mount point, which cannot be replaced: name a folder in it"),
        ("file/a/out", "file/a/out cannot be made: .*/file is a file"),
        ("sealed/a/out", "sealed/a/out cannot be made: .*/sealed is not writable"),
    ],
)
def test_place_that_no_folder_can_be_renamed_to_is_refused_first(output, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("mine")
    Path("sealed").mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sealed" and access(path, mode))
    before = sorted(tmp_path.rglob("*"))
    assert main(["--model", "model.ckpt", "--output", output]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_that_cannot_be_made_after_all_is_one_line(tmp_path):
    with (
        pytest.raises(RefusedInputError, match="/proc/none/out cannot be written: "),
        staging.temporary_folder(Path("/proc/none/out"), False),
    ):
        raise AssertionError("nothing was to be made")


def test_overwriting_replaces_an_export_and_nothing_else(tmp_path):
    old, new, output = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    for path in (old, new):
        path.mkdir()
        (path / "export.json").write_text(path.name)
    old.rename(output)
    staging.check_output(output, overwrite=True)
    staging.into_place(new, output)
    assert (output / "export.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_model_larger_than_the_memory_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    parts = ("unet", "vae", "safety_checker", "image_encoder")
    for part in parts:
        (tmp_path / "model" / part).mkdir(parents=True)
    index = {part: ["library", "class"] for part in parts} | {"image_encoder": [None, None], "_class_name": "Pipeline"}
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    vae, weights = tmp_path / "model/vae", {"w": torch.zeros(1000, 500)}
    name = "diffusion_pytorch_model"
    save_file({"w": torch.zeros(1000, 1000, dtype=torch.float16)}, tmp_path / f"model/unet/{name}.safetensors")
    for shard in ("1", "2"):
        save_file({shard: torch.zeros(500, 500)}, vae / f"{shard}.safetensors")
    (vae / f"{name}.safetensors.index.json").write_text('{"weight_map": {"1": "1.safetensors", "2": "2.safetensors"}}')
    # Never read: variants, the safety checker, and what the pipeline has not.
    for unread in (f"unet/{name}.fp16", f"vae/{name}.non_ema", "safety_checker/model", "image_encoder/model"):
        save_file(weights, tmp_path / f"model/{unread}.safetensors")
    # 1.5 million parameters are 6 MB in float32, whatever the files hold.
    monkeypatch.setattr(staging, "available_memory_bytes", lambda: 6 * 10**6 - 1)
    with pytest.raises(RefusedInputError, match=r"model takes 0.0 GB of memory in float32, have 0.0: make room"):
        staging.check_memory_to_load(str(tmp_path / "model"))
    monkeypatch.setattr(staging, "available_memory_bytes", lambda: 6 * 10**6)
    staging.check_memory_to_load(str(tmp_path / "model"))
    staging.check_memory_to_load("a/hub-id")


def test_export_asks_for_two_copies_of_the_largest_graph_and_a_disk_for_all(tmp_path, monkeypatch):
    weights = {"unet": 4 * 10**9, "vae_decoder": 10**9}
    memory, disk = 8 * 10**9 + 700 * 2**20, int(5.5 * 10**9) + 2**20

    def check(free_memory, free_disk):
        monkeypatch.setattr(staging, "available_memory_bytes", lambda: free_memory)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free_disk))
        staging.check_resources(weights, tmp_path / "out")

    check(memory, disk)
    check(None, disk)  # a system that does not say
    for free_memory, free_disk in ((memory - 1, disk), (memory, disk - 1)):
        with pytest.raises(RefusedInputError, match=r"need 8\.7 GB of free memory and 5\.5 GB of disk, have 8\.7 and"):
            check(free_memory, free_disk)
