"""Find the captioned images of a folder, whose layout is detected, and check every entry before training starts.

No torch is imported before an image is read, so that `d2f train` refuses a folder at once.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from d2f_fast.data.captions import Captions, read_caption_file
from d2f_fast.data.file_names import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    METADATA_FILE,
    UNREAD_EXTENSIONS,
    Repeats,
    check_columns,
    checked_repeats,
    is_image,
    unread_images,
)
from d2f_fast.data.partner_files import find_files
from d2f_fast.errors import DatasetError, printable

if TYPE_CHECKING:
    from PIL import Image

MAX_LINE_BYTES = 1 << 20
EXPECTED_LAYOUTS = (
    f'expected {METADATA_FILE} with lines like {{"file_name": "a.png", "text": "a caption"}}, or images '
    f"({', '.join(IMAGE_EXTENSIONS)}) that each have a caption file beside them (a.png and a.txt), in the folder or in "
    "sub-folders; a sub-folder named 10_name repeats its images 10 times"
)


class NoCaptionsError(DatasetError):
    """A folder with images, and no captions for them."""


class Sample(TypedDict):
    """One captioned image.

    Attributes:
        image: The decoded image, in the mode and orientation of its file.
        text: Its caption, or a list of alternatives, of which each epoch uses one.
        path: Its file.
    """

    image: "Image.Image"
    text: str | list[str]
    path: Path


class CaptionedImages:
    """Read captioned images from a folder. An image is decoded only when it is asked for.

    There are two layouts. Either a `metadata.jsonl` names an image and its caption or captions on each line, or images
    have a caption file of the same name beside them, at any depth. In the second, the innermost sub-folder named
    `<number>_<name>` gives the number of times that its images are repeated, at most 200; 0 leaves them out. Hidden
    files and folders are not read, nor are images that `metadata.jsonl` does not list. The samples are in the order of
    the metadata lines, or of the sorted paths.

    Args:
        folder: Folder of the images.
        image_column: Column of the image in `metadata.jsonl`. "image", which None means, reads the key "file_name", and
            any other name the key "<name>_file_name"; a line without that key may have the name itself as its key.
        caption_column: Key of the caption in `metadata.jsonl`, a string or a list of alternatives; None means "text".
        caption_extension: Extension of the caption files; None means ".txt". The whole text of a file, without white
            space at either end, is the caption.

    Attributes:
        folder: Folder of the images.
        files: Number of image files that the samples come from; repeats are not counted.
        repeats: Number of repeats of each sub-folder named `<number>_<name>` with images, by its path in the folder.

    Raises:
        DatasetError: The folder has neither layout, or an argument is for the other one; a caption is missing, empty or
            over 10,000 characters; a captioned image is of a format that is not read; a folder asks for more than 200
            repeats; a file is missing or outside the folder; a metadata line is not JSON or lacks a key. When a sample
            is read: its image does not decode.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_column: str | None = None,
        caption_column: str | None = None,
        caption_extension: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DatasetError(f"{printable(self.folder)} is not a folder: {EXPECTED_LAYOUTS}")
        check_columns(self.folder, image_column, caption_column, caption_extension)
        if (self.folder / METADATA_FILE).is_file():
            column = image_column or "image"
            image_key = "file_name" if column == "image" else f"{column}_file_name"
            samples = _read_metadata(self.folder, (image_key, column), caption_column or "text")
        else:
            samples = _read_caption_files(self.folder, "." + (caption_extension or ".txt").removeprefix("."))
        self.files, self.repeats = 0, dict[str, int]()
        self._samples: list[tuple[str, Captions]] = []
        for name, captions, repeats in samples:
            self.files += 1
            self._samples += [(name, captions)] * repeats.times
            if repeats.folder:
                self.repeats[repeats.folder] = repeats.times
        if not self._samples:
            raise DatasetError(f"{printable(self.folder)} has no captioned images: {EXPECTED_LAYOUTS}")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        from d2f_fast.data.images import read_image  # It imports torch.

        path = self.path(index)
        return {"image": read_image(path), "text": self.text(index), "path": path}

    def path(self, index: int) -> Path:
        """Return the path of an image, without reading it."""
        return self.folder / self._samples[index][0]

    def captions(self, index: int) -> Captions:
        """Return the checked captions of an image, without reading the image."""
        return self._samples[index][1]

    def text(self, index: int) -> str | list[str]:
        """Return the caption of an image, or its list of alternatives, without reading the image."""
        return self.captions(index).text


def find_image_files(folder: Path) -> list[Path]:
    """Return the sorted paths of the images at any depth, with captions or without.

    Args:
        folder: Folder of the images. Hidden files and folders are not read, nor are other formats.

    Raises:
        DatasetError: It is not a folder, cannot be read, holds no image, or holds a link to a folder.
    """
    if not folder.is_dir():
        raise DatasetError(f"{printable(folder)} is not a folder: give a folder of images")
    images = [folder / name for name in sorted(_find_images(folder)) if is_image(name)]
    if not images:
        raise DatasetError(
            f"{printable(folder)} holds no images ({', '.join(IMAGE_EXTENSIONS)}): give a folder that does"
        )
    return images


def _read_metadata(
    folder: Path, image_keys: tuple[str, str], caption_key: str
) -> Iterator[tuple[str, Captions, Repeats]]:
    """Yield the image name and the captions of each line, which is not repeated."""
    path = folder / METADATA_FILE
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DatasetError(f"{printable(path)} cannot be read ({error.strerror}): check the file") from error
    with lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{printable(path)}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DatasetError(f"{where}: longer than {MAX_LINE_BYTES} bytes: shorten the captions")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                entry = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                raise DatasetError(f'{where}: not JSON: write {{"{image_keys[0]}": …, "{caption_key}": …}}') from error
            if text:
                yield _checked_entry(folder, entry, image_keys, caption_key, where)


def _checked_entry(
    folder: Path, entry: object, image_keys: tuple[str, str], caption_key: str, where: str
) -> tuple[str, Captions, Repeats]:
    """Return the image name and the captions of one line, or refuse it."""
    fields = entry if isinstance(entry, dict) else {}
    given = next((fields[key] for key in image_keys if key in fields), None)
    if not isinstance(given, str):
        raise DatasetError(
            f'{where}: no "{image_keys[0]}": add the name of the image file, or name its key with'
            f" --image_column{_keys_of(fields)}"
        )
    name = _relative_name(folder, given)
    if name is None:
        raise DatasetError(f"{where}: {given[:200]!r} leaves the folder: give a path relative to the folder")
    if not os.path.isfile(folder / name):
        raise DatasetError(f"{where}: no such file as {name[:200]!r}: add the image or remove the line")
    if not is_image(name):
        raise DatasetError(f"{where}: {name[:200]!r} is not one of {', '.join(IMAGE_EXTENSIONS)}: convert it to PNG")
    if caption_key not in fields:
        raise DatasetError(
            f'{where}: no "{caption_key}": add the caption, or name its key with --caption_column{_keys_of(fields)}'
        )
    return name, Captions.check(fields[caption_key], f'{where}: "{caption_key}"'), Repeats("", 1)


def _keys_of(fields: dict[str, object]) -> str:
    """Return the keys of a line for a message; empty where there are none."""
    keys = ", ".join(printable(f'"{key[:40]}"') for key in list(fields)[:8])
    return f"; the line has {keys}" if keys else ""


def _relative_name(folder: Path, given: str) -> str | None:
    """Return the name of a file relative to the folder; None where it lies outside, or might."""
    path = Path(given)
    if ".." in path.parts:
        return None
    if not path.anchor:
        return given
    for base in (folder.absolute(), folder.resolve()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return None


def _read_caption_files(folder: Path, extension: str) -> Iterator[tuple[str, Captions, Repeats]]:
    """Yield the image name, the caption and the repeats of each image below `folder`."""

    def caption_file(name: str) -> Path:
        return folder / (os.path.splitext(name)[0] + extension)

    names = sorted(_find_images(folder))
    if unread := unread_images(names, lambda name: caption_file(name).is_file()):
        shown = ", ".join(map(printable, unread[:8])) + (f" and {len(unread) - 8} more" if len(unread) > 8 else "")
        raise DatasetError(
            f"{printable(folder)}: captioned images of formats that are not read: {shown}: convert them to PNG, or"
            " remove their captions"
        )
    images = [name for name in names if is_image(name)]
    if not any(caption_file(name).is_file() for name in images):
        raise (NoCaptionsError if images else DatasetError)(
            f"{printable(folder)} has no captioned images: {_other_captions(folder, images, extension)}"
            f"{EXPECTED_LAYOUTS}"
        )
    for name in images:
        if (repeats := checked_repeats(folder, name)).times == 0:
            continue
        if not caption_file(name).is_file():
            raise DatasetError(
                f"{printable(folder / name)} has no caption: {_other_captions(folder, [name], extension)}write it into"
                f" {printable(caption_file(name))}"
            )
        yield name, read_caption_file(caption_file(name)), repeats


def _other_captions(folder: Path, names: list[str], extension: str) -> str:
    """Return the beginning of a cure where captions lie beside images under another extension; empty otherwise."""
    for other in CAPTION_EXTENSIONS:
        count = sum((folder / (os.path.splitext(name)[0] + other)).is_file() for name in names)
        if other != extension and count:
            images = f"{count} image{'s have' if count > 1 else ' has'}"
            return (
                f"{images} a {other} file beside {'them' if count > 1 else 'it'}: give --caption_extension {other}; or "
            )
    return ""


def _find_images(folder: Path) -> Iterator[str]:
    """Yield the names of the images at any depth, relative to `folder` and with forward slashes.

    Images of formats that are not read are among them.
    """
    for path in find_files(folder, lambda name: name.lower().endswith(IMAGE_EXTENSIONS + UNREAD_EXTENSIONS)):
        yield path.relative_to(folder).as_posix()
