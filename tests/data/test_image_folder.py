"""Folders of captioned images: their layouts, and a refusal for each entry that cannot be used."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.image_folder import MAX_LINE_BYTES, CaptionedImages, find_image_files
from d2f_fast.errors import DatasetError

NOISE = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = NOISE[..., :3], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def captioned(path: Path, caption: str = "a cat") -> Path:
    save(path).with_suffix(".txt").write_text(caption)
    return path


def with_metadata(folder: Path, *lines: object) -> Path:
    save(folder / "a.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def refusal(folder: Path, **columns: str) -> str:
    with pytest.raises(DatasetError) as caught:
        CaptionedImages(folder, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_metadata_lines_give_images_and_captions_in_order(tmp_path):
    save(tmp_path / "deep" / "b.PNG", 255 - NOISE[..., :3])
    lines = {"file_name": "deep/b.PNG", "text": " two "}, "", {"file_name": "a.png", "text": ["one", "uno"], "seed": 1}
    dataset = CaptionedImages(with_metadata(tmp_path, *lines))
    assert len(dataset) == 2
    assert [dataset[i]["text"] for i in range(2)] == ["two", ["one", "uno"]]
    assert [dataset[i]["path"] for i in range(2)] == [tmp_path / "deep/b.PNG", tmp_path / "a.png"]
    np.testing.assert_array_equal(np.asarray(dataset[0]["image"]), 255 - NOISE[..., :3])
    np.testing.assert_array_equal(np.asarray(dataset[1]["image"]), NOISE[..., :3])


def test_other_columns_have_the_keys_of_the_datasets_library(tmp_path):
    with_metadata(tmp_path, {"target_file_name": "a.png", "prompt": "a dog"})
    assert CaptionedImages(tmp_path, "target", "prompt")[0]["text"] == "a dog"


def test_column_may_be_named_by_its_key(tmp_path):
    with_metadata(tmp_path, {"path": "a.png", "text": "a dog"})
    assert CaptionedImages(tmp_path, "path")[0]["text"] == "a dog"
    assert CaptionedImages(with_metadata(tmp_path, {"image": "a.png", "text": "a dog"})).path(0) == tmp_path / "a.png"


def test_absolute_path_inside_the_folder_is_read(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "set")
    save(tmp_path / "set" / "b.png")
    for folder in (tmp_path / "set", tmp_path / "link"):
        with_metadata(folder, {"file_name": str(tmp_path / "set" / "b.png"), "text": "a dog"})
        assert CaptionedImages(folder).path(0) == folder / "b.png"
    for outside in (tmp_path / "a.png", tmp_path / "set" / ".." / "a.png", tmp_path / "set2" / "a.png"):
        message = refusal(with_metadata(tmp_path / "set", {"file_name": str(outside), "text": "a dog"}))
        assert "leaves the folder" in message


def test_captions_of_another_extension_are_suggested(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.caption").write_text("a dog")
    words = "has no captioned images: 2 images have a .caption file beside them: give --caption_extension .caption; or"
    assert words in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("a cat")
    words = "b.png has no caption: 1 image has a .caption file beside it: give --caption_extension .caption; or write"
    assert words in refusal(tmp_path)


def test_metadata_with_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    with_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png", "text": "a cat"}\r\n')
    assert CaptionedImages(tmp_path).text(0) == "a cat"


def test_caption_files_are_read_beside_images_of_every_extension_at_any_depth(tmp_path):
    names = ["a.png", "b.jpg", "c.jpeg", "f.jpe", "sub/d.webp", "sub/sub/e.BMP"]
    for name in reversed(names):
        captioned(tmp_path / name, f" caption of {name}\n")
    captioned(tmp_path / ".hidden" / "f.png")
    captioned(tmp_path / "._a.png")
    (tmp_path / "notes.md").write_text("not an image")
    dataset = CaptionedImages(tmp_path)
    assert [dataset.path(i).relative_to(tmp_path).as_posix() for i in range(len(dataset))] == names
    assert [dataset.text(i) for i in range(6)] == [f"caption of {name}" for name in names]
    assert {dataset[i]["image"].size for i in range(6)} == {(7, 9)}


def test_jpeg_files_of_windows_are_read(tmp_path):
    captioned(tmp_path / "a.jpg").rename(tmp_path / "a.jfif")
    assert CaptionedImages(tmp_path)[0]["image"].format == "JPEG"


def test_other_caption_extension_is_read_with_and_without_its_dot(tmp_path):
    save(tmp_path / "a.png").with_suffix(".caption").write_text("a cat")
    assert CaptionedImages(tmp_path, caption_extension=".caption").text(0) == "a cat"
    assert CaptionedImages(tmp_path, caption_extension="caption").text(0) == "a cat"


def test_numbered_folders_repeat_their_images_and_zero_leaves_them_out(tmp_path):
    for name in ["3_dog/a.png", "3_dog/b.png", "2_cat/deep/c.png", "2_cat/4_tom/d.png", "e.png", "x_5/f.png"]:
        captioned(tmp_path / name)
    save(tmp_path / "0_off" / "uncaptioned.png")
    dataset = CaptionedImages(tmp_path)
    counts: dict[str, int] = {}
    for i in range(len(dataset)):
        counts[dataset.path(i).stem] = counts.get(dataset.path(i).stem, 0) + 1
    assert counts == {"a": 3, "b": 3, "c": 2, "d": 4, "e": 1, "f": 1}


def test_images_are_decoded_only_when_they_are_asked_for(tmp_path):
    captioned(tmp_path / "a.png")
    captioned(tmp_path / "b.png").write_bytes(b"not an image")
    dataset = CaptionedImages(tmp_path)
    assert len(dataset) == 2
    assert dataset[0]["image"].size == (7, 9)
    with pytest.raises(DatasetError, match=r"b\.png does not decode"):
        dataset[1]


@pytest.mark.parametrize("content", ["nothing", "images without captions", "a file", "missing"])
def test_folder_of_unknown_layout_is_refused_with_the_known_layouts(tmp_path, content):
    folder = tmp_path / "set"
    if content == "a file":
        folder.write_text("x")
    elif content != "missing":
        folder.mkdir()
        if content == "images without captions":
            save(folder / "a.png")
    message = refusal(folder)
    assert str(folder) in message
    for part in ["metadata.jsonl", '{"file_name": "a.png", "text": "a caption"}', "a.png and a.txt", "10_name"]:
        assert part in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"file_name": "a.png", "prompt": "x"},
            'line 2: no "text": add the caption, or name its key with --caption_column; the line has "file_name",'
            ' "prompt"',
        ),
        ({"file_name": "a.png", "text": None}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": " \n"}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": []}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": ["fine", ""]}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": 7}, 'line 2: "text" is not text'),
        ({"file_name": "a.png", "text": "x" * 10_001}, 'line 2: "text" is a caption of more than 10000 characters'),
        ({"file_name": "a.png", "text": "\ud800"}, 'line 2: "text" holds half a surrogate pair'),
        (
            {"path": "a.png", "text": "a cat"},
            'line 2: no "file_name": add the name of the image file, or name its key with --image_column; the line has'
            ' "path", "text"',
        ),
        ({"file_name": 7, "text": "a cat"}, 'line 2: no "file_name"'),
        (["a.png", "a cat"], 'line 2: no "file_name"'),
        ('{"file_name": "a.png", ', "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("1" * 5_000, "line 2: not JSON"),
        ({"file_name": "b.png", "text": "a cat"}, "line 2: no such file as 'b.png': add the image or remove the line"),
        ({"file_name": "", "text": "a cat"}, "line 2: no such file as ''"),
        ({"file_name": "a\0.png", "text": "a cat"}, "line 2: no such file as 'a\\x00.png'"),
        ({"file_name": "x" * 5_000, "text": "a cat"}, "line 2: no such file as 'xxx"),
        ({"file_name": "../a.png", "text": "a cat"}, "line 2: '../a.png' leaves the folder: give a path relative"),
        ({"file_name": "b/../a.png", "text": "a cat"}, "line 2: 'b/../a.png' leaves the folder"),
        ({"file_name": "/etc/passwd", "text": "a cat"}, "line 2: '/etc/passwd' leaves the folder"),
        ({"file_name": "metadata.jsonl", "text": "a cat"}, "line 2: 'metadata.jsonl' is not one of .png, .jpg"),
        (json.dumps({"file_name": "a.png", "text": ["x" * 9_000] * 120}), f"line 2: longer than {MAX_LINE_BYTES}"),
    ],
)
def test_bad_metadata_line_is_refused_by_file_and_number(tmp_path, line, expected):
    message = refusal(with_metadata(tmp_path, {"file_name": "a.png", "text": "x" * 10_000}, line))
    assert message.startswith(f"{tmp_path / 'metadata.jsonl'}, {expected}")
    assert len(message) < 600


def test_metadata_that_is_not_utf8_is_refused(tmp_path):
    with_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    assert "line 1: not JSON" in refusal(tmp_path)


def test_empty_metadata_is_refused_with_the_known_layouts(tmp_path):
    assert "has no captioned images: expected metadata.jsonl" in refusal(with_metadata(tmp_path, ""))


def test_missing_caption_file_is_refused_by_name(tmp_path):
    captioned(tmp_path / "a.png")
    save(tmp_path / "b.png")
    assert refusal(tmp_path) == f"{tmp_path / 'b.png'} has no caption: write it into {tmp_path / 'b.txt'}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b" \n", "is missing or empty: give each image a caption"),
        (b"caf\xe9", "is not UTF-8 text: save it as UTF-8"),
        ("é".encode() * 10_001, "is a caption of more than 10000 characters: shorten it"),
        (("x" + "\U0001f600" * 10_001).encode(), "is a caption of more than 10000 characters: shorten it"),
    ],
)
def test_bad_caption_file_is_refused_by_name(tmp_path, content, expected):
    caption = captioned(tmp_path / "a.png").with_suffix(".txt")
    caption.write_bytes(content)
    assert refusal(tmp_path) == f"{caption} {expected}"


def test_longest_caption_in_the_widest_characters_is_read(tmp_path):
    captioned(tmp_path / "a.png", "\ufeff" + "\U0001f600" * 10_000)
    assert CaptionedImages(tmp_path).text(0) == "\U0001f600" * 10_000


@pytest.mark.parametrize("folder", ["2024_holiday", "201_dog", "9" * 40 + "_dog"])
def test_more_than_200_repeats_are_refused_with_the_cure(tmp_path, folder):
    captioned(tmp_path / folder / "a.png")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / folder}: the number at the start of the name asks for that many repeats")
    assert message.endswith(f"at most 200: rename the folder, such as to 1_{folder}")
    (tmp_path / folder).rename(tmp_path / f"1_{folder}")
    assert len(CaptionedImages(tmp_path)) == 1


def test_files_and_repeats_are_counted(tmp_path):
    for name in ["200_dog/a.png", "200_dog/b.png", "2_cat/deep/c.png", "2_cat/deep/4_tom/d.png", "e.png"]:
        captioned(tmp_path / name)
    dataset = CaptionedImages(tmp_path)
    assert (dataset.files, len(dataset)) == (5, 2 * 200 + 2 + 4 + 1)
    assert dataset.repeats == {"200_dog": 200, "2_cat": 2, "2_cat/deep/4_tom": 4}


@pytest.mark.parametrize("others", [["b.tif"], ["b.tif", "sub/c.AVIF", "d.gif", "e.heic"]], ids=len)
def test_captioned_images_of_formats_that_are_not_read_are_named_and_refused(tmp_path, others):
    captioned(tmp_path / "a.png")
    for name in others:
        captioned((tmp_path / name).with_suffix(".png")).rename(tmp_path / name)
    assert refusal(tmp_path) == (
        f"{tmp_path}: captioned images of formats that are not read: {', '.join(sorted(others))}: convert them to PNG,"
        " or remove their captions"
    )


def test_long_list_of_unread_images_is_cut(tmp_path):
    for i in range(11):
        (tmp_path / f"{i:02}.tif").write_bytes(b"")
        (tmp_path / f"{i:02}.txt").write_text("a cat")
    assert ", 07.tif and 3 more: convert them to PNG" in refusal(tmp_path)


def test_image_of_an_unread_format_without_a_caption_or_beside_its_png_is_passed_over(tmp_path):
    captioned(tmp_path / "a.png")
    for name in ("a.tif", "preview.gif", "0_off/b.tif", "0_off/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert len(CaptionedImages(tmp_path)) == 1


def test_links_to_folders_broken_links_and_pipes_are_refused(tmp_path):
    captioned(tmp_path / "set" / "a.png")
    linked = tmp_path / "set" / "linked"
    linked.symlink_to(tmp_path)
    assert refusal(tmp_path / "set") == f"{linked} is a link to a folder: replace it by the folder, or remove it"
    linked.unlink()
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "nowhere.png")
    assert "b.png is not a file, or a broken link: remove it" in refusal(tmp_path / "set")
    (tmp_path / "set" / "b.png").unlink()
    os.mkfifo(tmp_path / "set" / "c.png")
    assert "c.png is not a file, or a broken link: remove it" in refusal(tmp_path / "set")


def test_name_with_a_line_break_keeps_the_message_on_one_line(tmp_path):
    captioned(tmp_path / "a.png")
    save(tmp_path / "b\n\x1b[31m.png")
    assert "b\\n\\x1b[31m.png" in refusal(tmp_path)


def test_options_of_the_other_layout_are_refused(tmp_path):
    captioned(tmp_path / "a.png")
    assert "caption_column caption is read from metadata.jsonl" in refusal(tmp_path, caption_column="caption")
    with_metadata(tmp_path, {"file_name": "a.png", "caption": "a dog"})
    assert CaptionedImages(tmp_path, caption_column="caption").text(0) == "a dog"
    columns = {"caption_column": "caption", "caption_extension": "txt"}
    assert "caption_extension txt has no effect" in refusal(tmp_path, **columns)


def test_image_files_are_found_at_any_depth_with_and_without_captions(tmp_path):
    paths = [captioned(tmp_path / "b.png"), save(tmp_path / "a" / "c.JPG"), save(tmp_path / "a.bmp")]
    save(tmp_path / ".hidden" / "d.png")
    (tmp_path / "e.gif").touch()
    assert find_image_files(tmp_path) == [paths[2], paths[1], paths[0]]
    with pytest.raises(DatasetError, match="is not a folder"):
        find_image_files(tmp_path / "b.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no images"):
        find_image_files(tmp_path / "empty")
