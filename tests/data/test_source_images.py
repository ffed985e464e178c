"""Folders of source and target images: their pairs and captions, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

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


@pytest.mark.parametrize("name", ["source/b/c.txt", "source/metadata.jsonl", "metadata.jsonl", "a.caption"])
def test_captions_outside_the_target_images_are_refused(folder: Path, name: str) -> None:
    (folder / name).touch()
    with pytest.raises(
        DatasetError, match=rf"{name}: captions are those of the target images: move them into .*/targe"
    ):
        SourceTargetFolder(folder)


def test_numbers_of_folders_repeat_images_without_captions(folder: Path) -> None:
    for name in ("source", "target"):
        (folder / name / "b").rename(folder / name / "3_b")
    pairs = SourceTargetFolder(folder)
    assert [pair.target.name for pair in pairs] == ["c.webp"] * 3 + ["a.png"]
    assert (pairs.files, pairs.repeats) == (2, {"3_b": 3})
    for name in ("source", "target"):
        (folder / name / "3_b").rename(folder / name / "0_b")
    assert [pair.target.name for pair in SourceTargetFolder(folder)] == ["a.png"]
    for name in ("source", "target"):
        (folder / name / "0_b").rename(folder / name / "201_b")
    with pytest.raises(DatasetError, match="asks for that many repeats of each image, at most 200"):
        SourceTargetFolder(folder)


def test_image_of_another_format_is_refused(folder: Path) -> None:
    (folder / "source/a.tiff").touch()  # an original beside the image that is read
    assert len(SourceTargetFolder(folder)) == 2
    for name in ("source", "target"):
        (folder / name / "d.GIF").touch()
    with pytest.raises(DatasetError, match=r"source/d.GIF is of a format that is not read: convert it to PNG"):
        SourceTargetFolder(folder)


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


def test_sizes_are_compared_without_decoding(folder: Path) -> None:
    for name, size in (("source/a.jpg", (6, 4)), ("target/a.png", (4, 6)), ("source/b/c.png", (8, 8))):
        Image.new("RGB", size).save(folder / name)
    pairs = SourceTargetFolder(folder)
    with pytest.raises(DatasetError, match=r"c\.webp does not decode"):
        pairs.check_sizes()
    Image.new("RGB", (8, 9)).save(folder / "target/b/c.webp")
    with pytest.raises(DatasetError, match=r"c\.png has 8x8 pixels and .*c\.webp 8x9: give both in the same size"):
        pairs.check_sizes()
    Image.new("RGB", (8, 8)).save(folder / "target/b/c.webp")
    pairs.check_sizes()  # The first pair may be turned by an EXIF entry.


def test_several_folders_are_mixed_by_weight(folder: Path) -> None:
    both = SourceTargetDataset([SourceTargetFolder(folder)] * 2, SourceOptions(0.25), (3.0, 1.0))
    assert len(both) == 4 and both.mixture is not None and both.mixture.counts == (3, 1)
    assert both[3] == both[1] and both.path(2) == folder / "target/a.png"
    assert both.content(0, lambda path: path.name) == "a.jpg a.png"
    assert both.settings() == {"source_noise": 0.25}
    assert SourceTargetDataset(SourceTargetFolder(folder)).mixture is None
