"""Decode image files, convert them to 8-bit RGB, and make training pixels of them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from d2f_fast.data.image_headers import IMAGE_FORMATS, MAX_IMAGE_PIXELS, opened_image
from d2f_fast.image_sizes import Size, sizes_of

# An image is converted in strips of so many rows, because the steps of a conversion hold several copies.
_STRIP_ROWS = 256
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes) -> Image.Image:
    """Decode the bytes of a PNG, JPEG, WebP or BMP image, and leave its mode and orientation as they are stored.

    Args:
        content: Bytes of an image of at most 2**26 pixels.

    Raises:
        ValueError: The image has more than 2**26 pixels. Pillow raises exceptions of other types for damaged ones.
    """
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
        image.load()
        return image


def read_image(path: Path) -> Image.Image:
    """Decode a PNG, JPEG, WebP or BMP file, and leave its mode and orientation as they are stored.

    Args:
        path: Image file of at most 512 MiB and 2**26 pixels, which the file's header gives before anything is decoded.
            The content decides the format, not the name.

    Returns:
        The image, decoded and independent of the file. `to_rgb` makes it upright RGB.

    Raises:
        DatasetError: The file does not decode, is larger than 512 MiB, or has more than 2**26 pixels.
    """
    with opened_image(path) as image:
        image.load()
        return image


def is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF entry of an image says that it is shown turned or mirrored.

    Args:
        image: Image as `read_image` returns it.
    """
    return image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNS


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright (EXIF), put it on white where it is transparent, and reduce it to 8-bit RGB.

    Images of 16-bit grey keep their high byte, as the decoder does for 16-bit colours.

    Args:
        image: Image of any mode but floating point, of at most 2**26 pixels. It is not changed.

    Returns:
        A new image of mode "RGB" without metadata, so that a second call returns the same pixels.

    Raises:
        ValueError: The image is floating point, has values outside 0 … 65535, lacks its palette, or has more than 2**26
            pixels. Pillow raises exceptions of other types where the image is damaged and not decoded yet.
    """
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}: make the image smaller")
    if image.mode == "F":
        raise ValueError("floating-point images have no defined white: convert them to 8 bits")
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError("the palette is missing: replace the image")
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    upright = image if turn is None else image.transpose(turn)
    rgb = Image.new("RGB", upright.size)
    for top in range(0, upright.height, _STRIP_ROWS):
        strip = upright.crop((0, top, upright.width, min(top + _STRIP_ROWS, upright.height)))
        rgb.paste(_strip_to_rgb(strip), (0, top))
    return rgb


def preprocess(
    image: Image.Image,
    resolution: int | Size,
    center_crop: bool,
    flip: bool,
    crop: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Resize an image with Lanczos, crop it to a size, mirror it, and scale to [-1, 1], as the diffusers scripts do.

    For a square this equals `Normalize(0.5, 0.5)(ToTensor()(crop(Resize(resolution, LANCZOS)(image))))` of torchvision.
    An image that has the size keeps its pixels: value / 127.5 - 1.

    Args:
        image: Image of mode "RGB", as `to_rgb` returns it.
        resolution: Side of a square in pixels, or a size.
        center_crop: Whether the middle is cropped. Otherwise `crop` gives the position.
        flip: Whether the image is mirrored left to right, after the crop.
        crop: Position of the crop, (vertical, horizontal), each in [0, 1): 0 is the top or left end.

    Returns:
        Pixels, [3, height, width], float32.

    Raises:
        ValueError: The resized image would have more than 2**26 pixels.
    """
    size, box = crop_of(image.size, resolution, center_crop, crop)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image = image.crop(box)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return (values / 127.5 - 1).contiguous()


def crop_of(
    size: tuple[int, int], resolution: int | Size, center_crop: bool, crop: tuple[float, float] = (0.0, 0.0)
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Return to which size an image is resized, so that it just covers a resolution, and where it is cropped to that.

    Args:
        size: Width and height of the image, in pixels.
        resolution: Side of a square in pixels, or a size.
        center_crop: Whether the middle is cropped. Otherwise `crop` gives the position.
        crop: Position of the crop, (vertical, horizontal), each in [0, 1).

    Returns:
        Width and height of the resized image; left, top, right and bottom of the crop in it.

    Raises:
        ValueError: The resized image would have more than 2**26 pixels.
    """
    wanted = sizes_of(resolution)[0]
    # The side that the image has less of, in proportion, is scaled to the wanted one.
    width, height = size
    if wanted.width * height >= wanted.height * width:
        width, height = wanted.width, wanted.width * height // width
    else:
        width, height = wanted.height * width // height, wanted.height
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels are too elongated for resolution {resolution}: crop the image")
    spare = (height - wanted.height, width - wanted.width)
    if center_crop:
        top, left = (round(pixels / 2) for pixels in spare)
    else:
        top, left = (int(position * (pixels + 1)) for position, pixels in zip(crop, spare, strict=True))
    return (width, height), (left, top, left + wanted.width, top + wanted.height)


def _strip_to_rgb(strip: Image.Image) -> Image.Image:
    """Return a strip of an upright image as 8-bit RGB on white.

    Raises:
        ValueError: The strip has values outside 0 … 65535.
    """
    if strip.mode.startswith("I"):
        wide = np.asarray(strip)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("values outside 0 … 65535: convert the image to 8 bits")
        grey = (wide >> 8).astype(np.uint8)
        grey[wide == strip.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if strip.has_transparency_data:
        colours = strip.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return strip.convert("RGB")
