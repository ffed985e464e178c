"""Open image files with limits, and read their sizes from their headers. Imports no torch."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from d2f_fast.errors import DatasetError, printable

# Other decoders are never tried, whatever the file's name says: some of them start programs.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_IMAGE_PIXELS = 1 << 26  # An image of this size takes 0.5 GiB once it is decoded and converted.
MAX_IMAGE_BYTES = 1 << 29

# Pillow warns of images above its own limit, which is larger than the one here; the refusal says the same. The filter
# is the last of the list, so that it changes no filter of the user.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """Hold a PNG, JPEG, WebP or BMP file open inside a `with` block. Nothing is decoded yet.

    Args:
        path: Image file of at most 512 MiB and 2**26 pixels. The content decides the format, not the name.

    Raises:
        DatasetError: The file does not decode, here or in the block, is larger than 512 MiB, or has more than 2**26
            pixels.
    """
    try:
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_IMAGE_BYTES}")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_IMAGE_PIXELS}")
            yield image
    except Exception as error:  # Pillow's decoders raise exceptions of any type when a file is damaged.
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else reason_of(error)
        formats = ", ".join(IMAGE_FORMATS)
        raise DatasetError(f"{printable(path)} does not decode as {formats} ({reason}): replace it") from error


def stored_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file in pixels, from its header, before its EXIF entry turns it.

    Args:
        path: Image file; see `opened_image`.

    Raises:
        DatasetError: The file has no header of an image, or is too large.
    """
    with opened_image(path) as image:
        return image.size


def reason_of(error: Exception) -> str:
    """Return the message of an exception for a one-line message, or its type where it has no message.

    Args:
        error: Exception of a decoder or of a data set.
    """
    return printable(error)[:200] or type(error).__name__
