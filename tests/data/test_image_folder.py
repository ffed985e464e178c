"""Folders of captioned images: layouts, decoding to RGB, and every refusal."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.image_folder import MAX_LINE_BYTES, CaptionedImages
from d2f_fast.data.images import read_image, to_rgb
from d2f_fast.errors import DatasetError

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (9, 7, 4), dtype=np.uint8)


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


def test_metadata_gives_images_and_captions_in_the_order_of_its_lines(tmp_path):
    save(tmp_path / "deep" / "b.PNG", 255 - NOISE[..., :3])
    lines = {"file_name": "deep/b.PNG", "text": " two "}, "", {"file_name": "a.png", "text": ["one", "uno"], "seed": 1}
    dataset = CaptionedImages(with_metadata(tmp_path, *lines))
    assert len(dataset) == 2
    assert [dataset[i]["text"] for i in range(2)] == ["two", ["one", "uno"]]
    assert [dataset[i]["path"] for i in range(2)] == [tmp_path / "deep/b.PNG", tmp_path / "a.png"]
    np.testing.assert_array_equal(np.asarray(dataset[0]["image"]), 255 - NOISE[..., :3])
    np.testing.assert_array_equal(np.asarray(dataset[1]["image"]), NOISE[..., :3])


def test_other_columns_are_read_from_the_keys_that_datasets_uses_for_them(tmp_path):
    with_metadata(tmp_path, {"target_file_name": "a.png", "prompt": "a dog"})
    assert CaptionedImages(tmp_path, "target", "prompt")[0]["text"] == "a dog"


def test_metadata_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    with_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png", "text": "a cat"}\r\n')
    assert CaptionedImages(tmp_path).text(0) == "a cat"


def test_caption_files_are_read_beside_images_of_every_extension_at_any_depth(tmp_path):
    names = ["a.png", "b.jpg", "c.jpeg", "sub/d.webp", "sub/sub/e.BMP"]
    for name in reversed(names):
        captioned(tmp_path / name, f" caption of {name}\n")
    captioned(tmp_path / ".hidden" / "f.png")
    captioned(tmp_path / "._a.png")
    (tmp_path / "notes.md").write_text("not an image")
    dataset = CaptionedImages(tmp_path)
    assert [dataset.path(i).relative_to(tmp_path).as_posix() for i in range(len(dataset))] == names
    assert [dataset.text(i) for i in range(5)] == [f"caption of {name}" for name in names]
    assert {dataset[i]["image"].size for i in range(5)} == {(7, 9)}


def test_another_caption_extension_is_read_with_and_without_its_dot(tmp_path):
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


def test_images_are_not_decoded_before_they_are_asked_for(tmp_path):
    captioned(tmp_path / "a.png")
    captioned(tmp_path / "b.png").write_bytes(b"not an image")
    dataset = CaptionedImages(tmp_path)
    assert len(dataset) == 2
    assert dataset[0]["image"].size == (7, 9)
    with pytest.raises(DatasetError, match=r"b\.png does not decode"):
        dataset[1]


@pytest.mark.parametrize("content", ["nothing", "images without captions", "a file", "missing"])
def test_a_folder_in_no_known_layout_is_refused_with_the_layouts(tmp_path, content):
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
        ({"file_name": "a.png"}, 'line 2: "text" is missing or empty: give each image a caption'),
        ({"file_name": "a.png", "text": None}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": " \n"}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": []}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": ["fine", ""]}, 'line 2: "text" is missing or empty'),
        ({"file_name": "a.png", "text": 7}, 'line 2: "text" is not text'),
        ({"file_name": "a.png", "text": "x" * 10_001}, 'line 2: "text" is a caption of more than 10000 characters'),
        ({"file_name": "a.png", "text": "\ud800"}, 'line 2: "text" holds half a surrogate pair'),
        ({"text": "a cat"}, 'line 2: no "file_name": add the name of the image file'),
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
def test_a_bad_metadata_line_is_refused_by_file_and_number(tmp_path, line, expected):
    message = refusal(with_metadata(tmp_path, {"file_name": "a.png", "text": "x" * 10_000}, line))
    assert message.startswith(f"{tmp_path / 'metadata.jsonl'}, {expected}")
    assert len(message) < 600


def test_metadata_that_is_not_utf8_is_refused(tmp_path):
    with_metadata(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    assert "line 1: not JSON" in refusal(tmp_path)


def test_metadata_without_a_line_is_refused_with_the_layouts(tmp_path):
    assert "has no captioned images: expected metadata.jsonl" in refusal(with_metadata(tmp_path, ""))


def test_a_missing_caption_file_is_refused_by_name(tmp_path):
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
def test_a_bad_caption_file_is_refused_by_name(tmp_path, content, expected):
    caption = captioned(tmp_path / "a.png").with_suffix(".txt")
    caption.write_bytes(content)
    assert refusal(tmp_path) == f"{caption} {expected}"


def test_the_longest_caption_in_the_widest_characters_is_read(tmp_path):
    captioned(tmp_path / "a.png", "\ufeff" + "\U0001f600" * 10_000)
    assert CaptionedImages(tmp_path).text(0) == "\U0001f600" * 10_000


def test_too_many_repeats_are_refused(tmp_path):
    captioned(tmp_path / "20000_dog" / "a.png")
    assert "repeats its images, at most 10000 times: rename the folder" in refusal(tmp_path)


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


def test_a_name_with_a_line_break_keeps_the_message_on_one_line(tmp_path):
    captioned(tmp_path / "a.png")
    save(tmp_path / "b\n\x1b[31m.png")
    assert "b\\n\\x1b[31m.png" in refusal(tmp_path)


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *others: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decoded(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    again = to_rgb(image)
    assert (again.mode, again.size, again.tobytes()) == ("RGB", image.size, image.tobytes())
    return np.asarray(image)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    np.testing.assert_array_equal(decoded(save(tmp_path / f"a{suffix}", **options)), NOISE[..., :3])


ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", exif=exif, **options)
    np.testing.assert_array_equal(decoded(path), ORIENTED[orientation](NOISE[..., :3]))


def test_transparency_is_composited_on_white(tmp_path):
    pixels = NOISE.copy()
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    result = decoded(save(tmp_path / "a.png", pixels)).astype(float)
    alpha = pixels[..., 3:] / 255
    assert np.abs(result - (alpha * pixels[..., :3] + (1 - alpha) * 255)).max() <= 1
    assert (result[0] == 255).all()
    np.testing.assert_array_equal(result[1], pixels[1, :, :3])


def test_grey_with_alpha_is_composited_on_white(tmp_path):
    grey = np.stack([NOISE[..., 0], np.where(NOISE[..., 1] < 128, 0, 255).astype(np.uint8)], -1)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = np.where(grey[..., 1] == 255, grey[..., 0], 255)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), np.repeat(expected[..., None], 3, -1))


def test_palette_colours_and_palette_transparency_are_resolved(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "opaque.png")
    assert decoded(tmp_path / "opaque.png").tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    image.save(tmp_path / "one.png", transparency=1)
    assert decoded(tmp_path / "one.png").tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_a_transparent_colour_becomes_white(tmp_path):
    row = b"\0" + bytes([1, 2, 3, 9, 8, 7])
    (tmp_path / "a.png").write_bytes(png(2, 1, 8, 2, row, chunk(b"tRNS", struct.pack(">HHH", 9, 8, 7))))
    assert decoded(tmp_path / "a.png").tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    values = [0, 255, 256, 0x7FFF, 0x8000, 0xABCD, 0xFFFF]
    (tmp_path / "a.png").write_bytes(png(7, 1, 16, 0, b"\0" + struct.pack(">7H", *values)))
    assert decoded(tmp_path / "a.png")[0].tolist() == [[value >> 8] * 3 for value in values]
    transparent = chunk(b"tRNS", struct.pack(">H", 0xABCD))
    (tmp_path / "b.png").write_bytes(png(7, 1, 16, 0, b"\0" + struct.pack(">7H", *values), transparent))
    assert decoded(tmp_path / "b.png")[0, :, 0].tolist() == [0, 0, 1, 0x7F, 0x80, 255, 255]


def test_sixteen_bit_colour_keeps_its_high_byte(tmp_path):
    values = [0, 0x7FFF, 0xFFFF, 0xABCD, 256, 0x8000]
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *values)))
    assert decoded(tmp_path / "a.png").reshape(-1).tolist() == [value >> 8 for value in values]


def test_one_bit_and_cmyk_images_are_decoded(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert decoded(tmp_path / "a.png").tolist() == [[[255] * 3, [0] * 3]]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=100, subsampling=0)
    assert np.abs(decoded(tmp_path / "b.jpg").astype(int) - [255, 0, 0]).max() <= 3


def test_images_without_a_defined_white_are_refused():
    with pytest.raises(ValueError, match="floating-point images have no defined white"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(ValueError, match="values outside 0 … 65535"):
        to_rgb(Image.new("I", (2, 2), 70_000))


def broken_images() -> dict[str, bytes]:
    row = b"\0" + bytes(3 * 4)
    return {
        "empty": b"",
        "text": b"this is not an image",
        "header only": png(4, 4, 8, 2, row * 4)[:40],
        "cut short": png(9, 7, 8, 6, (b"\0" + NOISE[0].tobytes() + bytes(8)) * 7)[:-30],
        "bomb": png(100_000, 100_000, 8, 2, b""),
        "over our own limit": png(12_000, 12_000, 8, 2, b""),
        "no such filter": png(4, 4, 8, 2, (b"\x09" + bytes(12)) * 4),
        "text bomb": png(4, 4, 8, 2, row * 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 22)))),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "another format": b"P6 1 1 255\n\0\0\0",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # between Pillow's limit and ours
@pytest.mark.parametrize("kind", broken_images())
def test_an_image_that_does_not_decode_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(broken_images()[kind])
    with pytest.raises(DatasetError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path} does not decode as PNG, JPEG, WEBP, BMP (")
    assert message.endswith("): replace it")
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it passes over in damaged EXIF
def test_damaged_files_of_every_format_decode_or_are_refused(tmp_path):
    refused = 0
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {} if suffix == ".bmp" else {"exif": exif}
        intact = save(tmp_path / f"a{suffix}", np.repeat(NOISE[..., :3], 4, 0), **options).read_bytes()
        for trial in range(150):
            damaged = bytearray(intact)
            if trial < 50:
                del damaged[RANDOM.integers(len(damaged)) :]
            else:
                for position in RANDOM.integers(0, min(len(damaged), 200 if trial < 100 else len(damaged)), 3):
                    damaged[position] = RANDOM.integers(256)
            (tmp_path / f"b{suffix}").write_bytes(damaged)
            try:
                assert read_image(tmp_path / f"b{suffix}").mode == "RGB"
            except DatasetError:
                refused += 1
    assert refused > 200
