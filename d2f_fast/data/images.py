"""Decode image files, convert them to 8-bit RGB, and make training pixels of them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from d2f_fast.errors import DatasetError, printable

# Other decoders are never tried, whatever the file's name says: some of them start programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_IMAGE_PIXELS = 1 << 27
# Everything that Pillow raises when an image is damaged, or too large to be safe.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
_EXIF_ENTRIES = ("exif", "Raw profile type exif")


def read_image(path: Path) -> Image.Image:
    """Decode a PNG, JPEG, WebP or BMP file, and leave its mode and orientation as they are stored.

    Args:
        path: Image file of at most 2**27 pixels. Its content decides the format, not its name.

    Returns:
        The image, decoded and independent of the file. `to_rgb` makes it upright RGB.

    Raises:
        DatasetError: The file does not decode, or has more than 2**27 pixels.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
            image.load()
            return image
    except DECODING_ERRORS as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else printable(error)[:200]
        formats = ", ".join(IMAGE_FORMATS)
        raise DatasetError(f"{printable(path)} does not decode as {formats} ({reason}): replace it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright (EXIF), put it on white where it is transparent, and reduce it to 8-bit RGB.

    Images of 16-bit grey keep their high byte, as the decoder does for 16-bit colours.

    Args:
        image: Image of any mode but floating point. It is not changed.

    Returns:
        A new image of mode "RGB" without metadata, so that a second call returns the same pixels.

    Raises:
        ValueError: The image is floating point, or has values outside 0 … 65535.
    """
    image = _turn_upright(image)
    if image.mode == "F":
        raise ValueError("floating-point images have no defined white: convert them to 8 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("values outside 0 … 65535: convert the image to 8 bits")
        grey = wide >> 8
        grey[wide == image.info.get("transparency", -1)] = 255
        rgb = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # Orientation and transparency are applied now, and must not be applied again.
    return rgb


def preprocess(
    image: Image.Image, resolution: int, center_crop: bool, flip: bool, crop: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Resize the short side with Lanczos, crop a square, mirror it, and scale to [-1, 1], as the diffusers scripts do.

    Equals `Normalize(0.5, 0.5)(ToTensor()(crop(Resize(resolution, LANCZOS)(image))))` of torchvision. An image that is
    `resolution` pixels square keeps its pixels: value / 127.5 - 1.

    Args:
        image: Image of mode "RGB", as `to_rgb` returns it.
        resolution: Side of the square, in pixels.
        center_crop: Whether the middle is cropped. Otherwise `crop` gives the position.
        flip: Whether the square is mirrored left to right, after the crop.
        crop: Position of the crop, (vertical, horizontal), each in [0, 1): 0 is the top or left end.

    Returns:
        Pixels, [3, resolution, resolution], float32.

    Raises:
        ValueError: The resized image would have more than 2**27 pixels.
    """
    short = min(image.size)
    width, height = (resolution * side // short for side in image.size)
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels are too elongated for resolution {resolution}: crop the image"
        )
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    spare = (height - resolution, width - resolution)
    if center_crop:
        top, left = (round(pixels / 2) for pixels in spare)
    else:
        top, left = (int(position * (pixels + 1)) for position, pixels in zip(crop, spare, strict=True))
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return (values / 127.5 - 1).contiguous()


def _turn_upright(image: Image.Image) -> Image.Image:
    """Return a copy of an image, turned and mirrored as its EXIF orientation asks."""
    upright = image.copy()
    # The tags are parsed here and kept. Without their bytes, exif_transpose has nothing to write back, which would fail
    # for files whose other tags are damaged.
    upright.getexif()
    for name in _EXIF_ENTRIES:
        upright.info.pop(name, None)
    ImageOps.exif_transpose(upright, in_place=True)
    return upright
