"""Files are listed from the top of a folder down, and only so many."""

from pathlib import Path

import pytest

from d2f_fast.files import walk
from d2f_fast.files.walk import bytes_below, files_below


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with two files, two files in a folder of it, and hidden ones."""
    for name in ("b/z", "b/c/y", "a", "x", ".hidden", ".git/object"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def test_files_of_the_folder_come_first_and_hidden_ones_are_left_out(tree: Path) -> None:
    names = [path.relative_to(tree).as_posix() for path in files_below(tree)]
    assert names == ["a", "x", "b/z", "b/c/y"]
    assert [path.name for path in files_below(tree, most=2)] == ["a", "x"]


def test_bytes_are_those_of_the_files_looked_at(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_below(tree) == 20
    monkeypatch.setattr(walk, "MOST_FILES", 3)
    assert bytes_below(tree) == 15
