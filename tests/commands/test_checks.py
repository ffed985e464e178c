"""What several commands check alike before the slow imports."""

from pathlib import Path

import pytest

from d2f_fast.commands.checks import check_lora_and_output
from d2f_fast.errors import CheckpointError, RefusedInputError


def test_missing_lora_and_a_file_as_output_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    check_lora_and_output((), str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        check_lora_and_output((f"{tmp_path / 'nope'}:0.5",), str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(RefusedInputError, match="cannot be made a folder"):
        check_lora_and_output((), str(tmp_path / "file"))
