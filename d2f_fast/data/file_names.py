"""Say what the names of files and folders mean in a folder of captioned images or of pairs. Imports no torch."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from d2f_fast.errors import DatasetError, printable

METADATA_FILE = "metadata.jsonl"
# What pairs of noise and latents are made of and how, beside their shards.
PAIRS_FILE = "pairs.json"
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
# Formats that are not read. A captioned image of such a name is refused, because it would be missed in silence.
UNREAD_EXTENSIONS = (
    *(".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".apng", ".svg", ".psd", ".tga"),
    *(".ico", ".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
)
# Extensions of caption files that other programs write.
CAPTION_EXTENSIONS = (".txt", ".caption", ".cap")
MAX_REPEATS = 200

_REPEATS = re.compile(r"([0-9]+)_")


class Repeats(NamedTuple):
    """Number of times that an image is repeated.

    Attributes:
        folder: Innermost sub-folder named `<number>_<name>`, relative to the data set; "" where there is none.
        times: Its number, or 1.
    """

    folder: str
    times: int


def repeats_of(name: str) -> Repeats:
    """Return how often an image is repeated, by the names of its folders.

    Args:
        name: Name of the image relative to the data set's folder, with forward slashes.
    """
    for parent in PurePosixPath(name).parents:
        # Digits beyond any sensible number are not converted: Python refuses to convert thousands of them.
        if match := _REPEATS.match(parent.name):
            return Repeats(str(parent), int(match[1]) if len(match[1]) < 10 else MAX_REPEATS + 1)
    return Repeats("", 1)


def checked_repeats(folder: Path, name: str) -> Repeats:
    """Return how often an image is repeated, and refuse a number above 200.

    Args:
        folder: Folder of the data set, for the message.
        name: Name of the image relative to it, with forward slashes.

    Raises:
        DatasetError: A folder asks for more repeats.
    """
    repeats = repeats_of(name)
    if repeats.times > MAX_REPEATS:
        own = printable(PurePosixPath(repeats.folder).name)
        raise DatasetError(
            f"{printable(folder / repeats.folder)}: the number at the start of the name asks for that many repeats of"
            f" each image, at most {MAX_REPEATS}: rename the folder, such as to 1_{own}"
        )
    return repeats


def check_columns(
    folder: Path, image_column: str | None, caption_column: str | None, caption_extension: str | None
) -> None:
    """Refuse an option of the other one of the two layouts, where it would have no effect.

    Args:
        folder: Folder of the captioned images.
        image_column: Column of the image in the metadata file; None where it was not given.
        caption_column: Key of the caption in the metadata file; None where it was not given.
        caption_extension: Extension of the caption files; None where it was not given.

    Raises:
        DatasetError: A column is given and there is no metadata file, or an extension and there is one.
    """
    has_metadata = (folder / METADATA_FILE).is_file()
    if has_metadata and caption_extension is not None:
        raise DatasetError(
            f"caption_extension {printable(caption_extension)} has no effect, because the captions are in"
            f" {printable(folder / METADATA_FILE)}: leave caption_extension out, or remove that file"
        )
    for option, value in (("image_column", image_column), ("caption_column", caption_column)):
        if value is not None and not has_metadata:
            raise DatasetError(
                f"{option} {printable(value)} is read from {METADATA_FILE}, which {printable(folder)} does not hold:"
                f" leave {option} out, or add that file"
            )


def is_image(name: str) -> bool:
    """Return whether the extension of a file name is that of an image that is read."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def unread_images(names: Iterable[str], is_captioned: Callable[[str], bool]) -> list[str]:
    """Return the captioned images of formats that are not read, except those that also exist in a format that is.

    Args:
        names: Names of all files, relative to the data set's folder, with forward slashes.
        is_captioned: Function that says whether an image has a caption file.
    """
    names = list(names)
    read = {name.rpartition(".")[0] for name in names if is_image(name)}
    others = (name for name in names if name.lower().endswith(UNREAD_EXTENSIONS))
    return [
        name for name in others if name.rpartition(".")[0] not in read and repeats_of(name).times and is_captioned(name)
    ]
