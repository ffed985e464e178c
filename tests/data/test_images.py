"""Decoding of image files, conversion to RGB, and training pixels."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from d2f_fast.data.image_headers import MAX_IMAGE_BYTES
from d2f_fast.data.images import preprocess, read_image, to_rgb
from d2f_fast.data.loading import read_sample
from d2f_fast.errors import DatasetError
from d2f_fast.image_sizes import Size

HOSTILE = Path(__file__).parents[1] / "hostile"
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (9, 7, 4), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = NOISE[..., :3], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *others: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decoded(path: Path) -> np.ndarray:
    image = to_rgb(read_image(path))
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


@pytest.mark.filterwarnings("ignore")  # Pillow warns about the damaged tags
def test_damaged_exif_tags_do_not_hide_the_orientation():
    exif = Image.Exif()
    exif[0x0112], exif[0x0110], exif[0x011A] = 6, "model", 72.0
    intact, random = exif.tobytes(), np.random.default_rng(1)
    image = Image.fromarray(NOISE[..., :3])
    turned = 0
    for _ in range(500):
        damaged = bytearray(intact)
        for position in random.integers(14, len(damaged), 3):
            damaged[position] = random.integers(256)
        given = image.copy()
        given.info["exif"] = bytes(damaged)
        orientation = given.getexif().get(0x0112, 1)
        expected = ORIENTED.get(orientation, ORIENTED[1])(NOISE[..., :3])
        np.testing.assert_array_equal(np.asarray(to_rgb(given)), expected)
        assert given.info["exif"] == bytes(damaged)
        turned += orientation == 6
    assert turned > 100


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


def test_transparent_colour_becomes_white(tmp_path):
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
def test_image_that_does_not_decode_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(broken_images()[kind])
    with pytest.raises(DatasetError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path} does not decode as PNG, JPEG, WEBP, BMP (")
    assert message.endswith("): replace it")
    assert "\n" not in message


@pytest.mark.parametrize("error", [AssertionError(), IndexError("i"), struct.error("s"), KeyError("k"), MemoryError()])
@pytest.mark.parametrize("method", ["open", "load"])
def test_every_exception_of_a_decoder_names_the_file(tmp_path, monkeypatch, method, error):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    path = save(tmp_path / "a.png")
    monkeypatch.setattr(*{"open": (Image, "open"), "load": (PngImageFile, "load")}[method], fail)
    with pytest.raises(DatasetError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path} does not decode as PNG, JPEG, WEBP, BMP (") and "()" not in message


def test_image_without_its_palette_is_refused_by_name():
    with pytest.raises(DatasetError, match=r"no_palette\.png: the palette is missing: replace the image$"):
        read_sample(OneFile(HOSTILE / "no_palette.png"), 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # between Pillow's limit and ours
def test_small_file_of_many_pixels_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(PngImageFile, "load", lambda image: pytest.fail("the image was decoded"))
    sentence = r"grey16_bomb\.png does not decode .*\(11585x11585 pixels, more than 67108864\): replace it"
    with pytest.raises(DatasetError, match=sentence):
        read_image(HOSTILE / "grey16_bomb.png")


def test_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)  # a sparse file, which takes no room
    with pytest.raises(
        DatasetError, match=rf"\({MAX_IMAGE_BYTES + 1} bytes, more than {MAX_IMAGE_BYTES}\): replace it"
    ):
        read_image(path)


def test_image_in_memory_of_too_many_pixels_is_refused():
    with pytest.raises(ValueError, match="8193x8192 pixels, more than 67108864: make the image smaller"):
        to_rgb(Image.new("1", (8193, 8192)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_image_higher_than_a_strip_converts_as_a_whole(mode):
    pixels = RANDOM.integers(0, 256, (600, 3, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + pixels[..., 1])
        expected = np.repeat(pixels[..., :1], 3, -1)
    else:
        image = Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)
        white = Image.new("RGBA", image.size, "white")
        opaque = mode in ("CMYK", "P") and not image.has_transparency_data
        whole = image.convert("RGB") if opaque else Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        expected = np.asarray(whole)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)


class OneFile:
    """Data set of one image file."""

    def __init__(self, path: Path) -> None:
        self.path_of_file = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Mapping[str, object]:
        return {"image": read_image(self.path_of_file), "text": "a cat", "path": self.path_of_file}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it passes over in damaged EXIF
def test_damaged_files_of_every_format_are_read_or_refused(tmp_path):
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
                assert read_sample(OneFile(tmp_path / f"b{suffix}"), 0).image.mode == "RGB"
            except DatasetError:
                refused += 1
    assert refused > 200


# Training pixels.


def lanczos_weights(source: int, target: int) -> np.ndarray:
    """Antialiased Lanczos-3 as a matrix [target, source], from its definition."""
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * scale
    offsets = (np.arange(source)[None] + 0.5 - centres) / stretch
    weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def smooth_image(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + columns / 9), np.cos(rows / 7), np.sin(columns / 4)]
    return Image.fromarray((np.stack(waves, -1) * 90 + 128).astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
def test_image_of_the_right_size_keeps_its_pixels(flip):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[0, :2] = [[0, 0, 0], [255, 255, 255]]
    for center_crop in (False, True):
        result = preprocess(Image.fromarray(pixels), 16, center_crop, flip, (0.99, 0.99))
        expected = pixels[:, ::-1] if flip else pixels
        assert (result.dtype, result.shape, result.is_contiguous()) == (torch.float32, (3, 16, 16), True)
        np.testing.assert_array_equal(result.numpy(), expected.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    assert (result.min(), result.max()) == (-1, 1)


@pytest.mark.parametrize(("height", "width"), [(40, 57), (57, 40), (9, 12), (101, 33), (16, 40), (16, 19), (21, 16)])
def test_short_side_is_resized_with_lanczos_and_the_middle_is_cropped(height, width):
    image = smooth_image(height, width)
    result = preprocess(image, 16, True, False)
    short = min(height, width)
    rows, columns = int(16 * height / short), int(16 * width / short)  # torchvision's Resize
    resized = np.einsum(
        "rh,cw,hwk->krc", lanczos_weights(height, rows), lanczos_weights(width, columns), np.asarray(image, float)
    ).clip(0, 255)
    top, left = round((rows - 16) / 2), round((columns - 16) / 2)  # torchvision's CenterCrop
    expected = resized[:, top : top + 16, left : left + 16] / 127.5 - 1
    assert np.abs(result.numpy() - expected).max() < 1.5 / 127.5  # Pillow rounds to 8 bits after each direction


def test_crop_reaches_every_position_and_flip_follows_the_crop():
    columns = np.arange(20, dtype=np.uint8) * 12
    image = Image.fromarray(np.broadcast_to(columns[None, :, None], (16, 20, 3)).copy())
    for position in range(5):
        for number in (position / 5 + 1e-9, (position + 1) / 5 - 1e-9):
            result = preprocess(image, 16, False, False, (0.7, number))
            expected = columns[position : position + 16].astype(np.float32) / 127.5 - 1
            np.testing.assert_array_equal(result[0, 0].numpy(), expected)
            assert torch.equal(preprocess(image, 16, False, True, (0.7, number)), result.flip(-1))
    upright = preprocess(image.transpose(Image.Transpose.TRANSPOSE), 16, False, False, (0.7, 0.0))
    np.testing.assert_array_equal(upright[0, :, 0].numpy(), columns[3:19].astype(np.float32) / 127.5 - 1)


def test_transparent_pixels_are_white_before_resizing():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert torch.equal(preprocess(to_rgb(image), 16, True, False), torch.ones(3, 16, 16))


def test_image_too_elongated_to_resize_is_refused():
    with pytest.raises(ValueError, match="60000x1 pixels are too elongated for resolution 512: crop the image"):
        preprocess(Image.new("RGB", (60_000, 1)), 512, True, False)


@pytest.mark.parametrize(("height", "width"), [(40, 57), (57, 40), (9, 12), (101, 33), (24, 16), (48, 32)])
@pytest.mark.parametrize("size", [Size(24, 16), Size(16, 24)])
def test_image_is_resized_until_it_covers_a_size_and_the_rest_is_cropped(height, width, size):
    result = preprocess(smooth_image(height, width), size, True, False)
    scale = max(size.height / height, size.width / width)
    # The side that is scaled to the size has exactly its pixels, and the other one is rounded down, as in torchvision.
    rows, columns = int(height * scale + 1e-9), int(width * scale + 1e-9)
    resized = np.einsum(
        "rh,cw,hwk->krc",
        lanczos_weights(height, rows),
        lanczos_weights(width, columns),
        np.asarray(smooth_image(height, width), float),
    ).clip(0, 255)
    top, left = round((rows - size.height) / 2), round((columns - size.width) / 2)
    expected = resized[:, top : top + size.height, left : left + size.width] / 127.5 - 1
    assert result.shape == (3, *size) and min(top, left) == 0
    assert np.abs(result.numpy() - expected).max() < 1.5 / 127.5
    mirrored = preprocess(smooth_image(height, width), size, True, True)
    assert torch.equal(mirrored, result.flip(-1))
