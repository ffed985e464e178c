"""Tests of the refusal of paths that no output folder can be given."""

import os
import re
from pathlib import Path

import pytest

from d2f_fast.export.to_onnx import main


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (".", "here is the current folder or contains it: name a new folder"),
        ("..", "is the current folder or contains it: name a new folder"),
        ("/proc", "output /proc is a mount point, which cannot be replaced: name a folder in it"),
        ("file/a/out", "file/a/out cannot be created: .*/file is a file; name another folder"),
        ("sealed/a/out", "sealed/a/out cannot be created: .*/sealed is not writable; name another folder"),
    ],
)
def test_unusable_output_path_is_refused_before_anything_is_written(output, sentence, tmp_path, monkeypatch, capsys):
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
