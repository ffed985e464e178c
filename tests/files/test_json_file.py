"""JSON files come back as written, and huge or missing ones are refused unread."""

import json
import math
from pathlib import Path

import pytest

from d2f_fast.errors import CheckpointError
from d2f_fast.files.json_file import read_json, write_json


def test_json_is_read_as_written_and_holds_no_nan(tmp_path: Path) -> None:
    written = {"prompt": "ein größerer Hund", "values": [1, 0.1, None, True]}
    write_json(tmp_path / "a.json", written)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == read_json(tmp_path / "a.json") == written
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"distance": math.nan})
    assert read_json(tmp_path / "a.json") == written


def test_huge_or_missing_json_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)  # sparse: reading it would end the process
    with pytest.raises(CheckpointError, match=r"huge\.json: larger than"):
        read_json(tmp_path / "huge.json")
    with pytest.raises(CheckpointError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
