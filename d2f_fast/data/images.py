"""Decode pictures to 8-bit RGB, and make training pixels of them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from d2f_fast.errors import DatasetError, printable


def preprocess(
    image: Image.Image, resolution: int, center_crop: bool, flip: bool, crop: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Resize the short side with Lanczos, crop a square, mirror it, and scale to [-1, 1]; as the diffusers scripts do.

    Equals `Normalize(0.5, 0.5)(ToTensor()(crop(Resize(resolution, LANCZOS)(image))))` of torchvision. An image that is
    `resolution` pixels square keeps its pixels: value / 127.5 - 1.

    Args:
        image: any mode, see `to_rgb`.
        resolution: side of the square, pixels.
        center_crop: crop the middle; otherwise `crop` says where.
        flip: mirror left and right, after the crop.
        crop: draws in [0, 1), (vertical, horizontal), of the position.

    Returns:
        [3, resolution, resolution], float32.

    Raises:
        ValueError: the resized image would have more than 2**27 pixels; or as `to_rgb`.
    """
    image = to_rgb(image)
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
        top, left = (int(draw * (pixels + 1)) for draw, pixels in zip(crop, spare, strict=True))
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return (pixels / 127.5 - 1).contiguous()


# Other decoders are never tried, whatever the file's name says: some of them start programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


MAX_IMAGE_PIXELS = 1 << 27


DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


_ORIENTATION = 0x0112


_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path) -> Image.Image:
    """Decode a PNG, JPEG, WebP or BMP file to RGB; see `to_rgb`.

    Raises:
        DatasetError: the file does not decode, or has more than 2**27 pixels.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
            return to_rgb(image)
    except DECODING_ERRORS as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else printable(error)[:200]
        formats = ", ".join(IMAGE_FORMATS)
        raise DatasetError(f"{printable(path)} does not decode as {formats} ({reason}): replace it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright (EXIF), put it on white where it is transparent, and reduce it to 8-bit RGB.

    16-bit greys keep their high byte, as the decoder does for 16-bit colours. Applied twice, it changes nothing more.

    Raises:
        ValueError: the image is floating point or has values outside 0 … 65535.
    """
    transposition = _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    if transposition is not None:
        image = image.transpose(transposition)
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
    rgb.info = {}  # its orientation and transparency are used up: a second call must not apply them again
    return rgb
