"""Folders of source and target images: their pairs and captions, and what is refused."""

import json
from pathlib import Path

import pytest

from d2f_fast.data.source_images import SourceTargetDataset, SourceTargetFolder
from d2f_fast.data.source_options import SourceOptions
from d2f_fast.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of two pairs without captions, whose images are not decoded."""
    for name in ("source/a.jpg", "source/b/c.png", "target/a.png", "target/b/c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_images_of_one_name_are_a_pair_with_the_empty_caption(folder: Path) -> None:
    pairs = SourceTargetFolder(folder)
    assert len(pairs) == 2 and pairs.captioned is None
    assert pairs[0][:2] == (folder / "source/a.jpg", folder / "target/a.png")
    assert pairs[1][:2] == (folder / "source/b/c.png", folder / "target/b/c.webp")
    assert [pair.captions.choose(0.5) for pair in pairs] == ["", ""]


def test_captions_are_those_of_the_target_images(folder: Path) -> None:
    (folder / "target/a.txt").write_text("a cat")
    with pytest.raises(DatasetError, match=r"c\.webp has no caption"):
        SourceTargetFolder(folder)
    (folder / "target/b/c.txt").write_text("a dog")
    assert [pair.captions.text for pair in SourceTargetFolder(folder)] == ["a cat", "a dog"]
    lines = [{"file_name": "b/c.webp", "words": ["x", "y"]}]
    (folder / "target/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (pair,) = SourceTargetFolder(folder, caption_column="words")
    assert pair.source == folder / "source/b/c.png" and pair.captions.text == ["x", "y"]


def test_folders_that_cannot_be_used_are_refused(folder: Path) -> None:
    (folder / "target/a.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 files have no target image of the same name, such as .*a\.jpg"):
        SourceTargetFolder(folder)
    (folder / "source/a.jpg").rename(folder / "target/a.png")
    with pytest.raises(DatasetError, match=r"1 of 2 files have no source image of the same name, such as .*a\.png"):
        SourceTargetFolder(folder)
    (folder / "source/b/c.png").unlink()
    with pytest.raises(DatasetError, match=r"source holds no images: expected the sub-folders source and target"):
        SourceTargetFolder(folder)
    (folder / "source/b").rmdir()
    (folder / "source").rmdir()
    with pytest.raises(DatasetError, match="has no sub-folder source: expected the sub-folders source and target"):
        SourceTargetFolder(folder)


def test_several_folders_are_mixed_by_weight(folder: Path) -> None:
    both = SourceTargetDataset([SourceTargetFolder(folder)] * 2, SourceOptions(0.25), (3.0, 1.0))
    assert len(both) == 4 and both.mixture is not None and both.mixture.counts == (3, 1)
    assert both[3] == both[1] and both.path(2) == folder / "target/a.png"
    assert both.content(0, lambda path: path.name) == "a.jpg a.png"
    assert both.settings() == {"source_noise": 0.25}
    assert SourceTargetDataset(SourceTargetFolder(folder)).mixture is None
