"""Tests of the refusal of unusable output folders, and of the folders that are replaced."""

from pathlib import Path

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.export import folder as folder_module
from d2f_fast.export.folder import export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.output_folder import check_output, output_folder


def test_folder_that_cannot_be_created_is_refused_in_one_line(tmp_path):
    with (
        pytest.raises(
            RefusedInputError, match=r"/proc/none cannot be made a folder \(No such file or directory\): name another"
        ),
        output_folder(Path("/proc/none/out"), keep_failed=False),
    ):
        raise AssertionError("the block must not be entered")


def test_overwriting_replaces_an_export_and_nothing_else(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "export.json").write_text("old")
    check_output(output, overwrite=True)
    with output_folder(output, keep_failed=False) as folder:
        (folder / "export.json").write_text("new")
    assert (output / "export.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_refused_in_one_line(one_level_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module.graphs, "save", full)
    monkeypatch.setattr(folder_module.graphs, "convert", lambda *_: object())
    with pytest.raises(RefusedInputError, match=r"out: the disk is full, [\d.]+ MiB free; make room and run again"):
        export_folder(
            ExportOptions(model=str(one_level_folder), output=str(tmp_path / "out"), components="vae_encoder")
        )
    assert list(tmp_path.iterdir()) == []
