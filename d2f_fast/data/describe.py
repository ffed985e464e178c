"""Describe a data set or a cache from names, sizes and headers alone. No image is decoded, and no torch is imported."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from d2f_fast.data.file_names import CAPTION_EXTENSIONS, MAX_REPEATS, METADATA_FILE, is_image, repeats_of, unread_images
from d2f_fast.errors import CheckpointError, printable
from d2f_fast.files.tensor_header import read_tensor_header
from d2f_fast.files.walk import MOST_FILES, files_below

CACHE_FORMAT = "d2f_fast.data.cache"
_MOST_HEADERS = 10_000


def describe_data_set(folder: Path, caption_extension: str = ".txt") -> dict[str, Any]:
    """Return what a folder of images holds, what training with it needs, and what is odd about it.

    Args:
        folder: Folder of the images.
        caption_extension: Extension of the caption files.
    """
    files = sorted(files_below(folder))
    images = [path for path in files if is_image(path.name)]
    sizes, unreadable = _sizes(images[:_MOST_HEADERS])
    listed = (folder / METADATA_FILE).is_file()
    odd = [f"{len(unreadable)} images cannot be read, such as {printable(unreadable[0])}"] if unreadable else []
    if len(files) == MOST_FILES:
        odd.append(f"only the first {MOST_FILES:,} files were looked at")
    if len(images) > _MOST_HEADERS:
        odd.append(f"only the sizes of the first {_MOST_HEADERS:,} images were read")
    if listed:
        captions, oddities = _listed_captions(folder, images)
    else:
        captions, oddities = _caption_files(images, caption_extension)
        names = (path.relative_to(folder).as_posix() for path in files)
        unread = unread_images(names, lambda name: (folder / name).with_suffix(caption_extension).is_file())
        if unread:
            odd.append(
                f"{len(unread)} captioned images are of formats that are not read, such as {printable(unread[0])}"
            )
    found = {repeats_of(path.relative_to(folder).as_posix()) for path in images}
    repeats = sorted(printable(each.folder) for each in found if each.folder)
    if not listed and (many := sorted(each.folder for each in found if each.times > MAX_REPEATS)):
        odd.append(f"{printable(many[0])} asks for more than {MAX_REPEATS} repeats, which is refused: rename it")
    return {
        "kind": f"data set, captions in {METADATA_FILE if listed else f'*{caption_extension} files'}",
        "images": len(images),
        "captions": captions,
        "sizes": _size_range(sizes),
        "repeats": ", ".join(repeats[:8]) if repeats and not listed else "none",
        "bytes": sum(image.stat().st_size for image in images),
        "needs": ["`d2f train --train_data_dir` with this folder; every image needs a caption"],
        "odd": odd + oddities + _size_oddities(sizes),
    }


def describe_cache(folder: Path) -> dict[str, Any]:
    """Return what a cache folder holds, and what is odd about it.

    Args:
        folder: Folder of the cache.
    """
    files = sorted(folder.glob("[0-9a-f][0-9a-f]/*.safetensors"))
    contents: Counter[str] = Counter()
    foreign, damaged = 0, []
    for path in files[:_MOST_HEADERS]:
        try:
            header = read_tensor_header(path)
        except CheckpointError:
            damaged.append(path)
            continue
        if header.entries.get("format") != CACHE_FORMAT:
            foreign += 1
            continue
        shapes = (f"{name} {info.dtype} {list(info.shape)}" for name, info in sorted(header.tensors.items()))
        contents[("latents: " if "mean" in header.tensors else "captions: ") + ", ".join(shapes)] += 1
    unfinished = list((folder / "unfinished").glob("*"))
    odd = [f"{len(damaged)} files are damaged and will be computed again, such as {damaged[0].name}"] if damaged else []
    if foreign:
        odd.append(f"{foreign} files are not of this package's cache")
    if unfinished:
        odd.append(f"{len(unfinished)} unfinished files: a process writes them now, or was killed")
    if len(files) > _MOST_HEADERS:
        odd.append(f"only the first {_MOST_HEADERS} files were read")
    return {
        "kind": "cache",
        "samples": len(files),
        "contents": {content: count for content, count in contents.most_common(8)},
        "bytes": sum(path.stat().st_size for path in files),
        "needs": ["the model, precision and images that it was made with: other samples are computed beside these"],
        "odd": odd,
    }


def _sizes(images: list[Path]) -> tuple[list[tuple[int, int]], list[Path]]:
    """Return width and height of the images, from their headers, and those that cannot be read."""
    sizes, unreadable = [], []
    for path in images:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except (OSError, ValueError, Image.DecompressionBombError):
            unreadable.append(path)
    return sizes, unreadable


def _listed_captions(folder: Path, images: list[Path]) -> tuple[int, list[str]]:
    """Return the number of captions in the metadata file, and what is odd about them."""
    names: set[str] = set()
    bad = 0
    with (folder / METADATA_FILE).open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
                names.add(name) if text else None
                bad += not text
            except (ValueError, TypeError, KeyError, RecursionError):
                bad += 1
    there = {path.relative_to(folder).as_posix() for path in images}
    odd = [f"{bad} lines have no file_name, no text or are not JSON"] if bad else []
    if missing := sorted(names - there):
        odd.append(f"{len(missing)} images that are listed do not exist, such as {printable(missing[0])}")
    if unlisted := sorted(there - names):
        odd.append(f"{len(unlisted)} images are not listed with a caption, such as {printable(unlisted[0])}")
    return len(names & there), odd


def _caption_files(images: list[Path], extension: str) -> tuple[int, list[str]]:
    """Return the number of images with a caption file, and what is odd about the others."""
    missing = [path for path in images if not path.with_suffix(extension).is_file()]
    there = [path for path in images if path.with_suffix(extension).is_file()]
    empty = [path for path in there if not path.with_suffix(extension).read_bytes().strip()]
    odd = []
    if missing:
        odd.append(f"{len(missing)} images have no caption file *{extension}, such as {printable(missing[0])}")
        others = Counter(other.suffix for path in missing for other in path.parent.glob(f"{path.stem}.*"))
        for suffix in CAPTION_EXTENSIONS:
            if suffix != extension and others[suffix]:
                odd.append(f"{others[suffix]} of them have a {suffix} file: train with --caption_extension {suffix}")
    if empty:
        odd.append(f"{len(empty)} captions are empty, such as that of {printable(empty[0])}")
    return len(there) - len(empty), odd


def _size_range(sizes: list[tuple[int, int]]) -> str:
    """Return the smallest and the largest image by area, in pixels."""
    if not sizes:
        return "none"
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    return " to ".join(dict.fromkeys(f"{width} × {height}" for width, height in (ordered[0], ordered[-1])))


def _size_oddities(sizes: list[tuple[int, int]]) -> list[str]:
    """Return what is odd about the sizes of the images."""
    small = sum(min(size) < 512 for size in sizes)
    long = sum(max(size) > 3 * min(size) for size in sizes)
    odd = [f"{small} images are shorter than 512 pixels on one side, and are enlarged for SD1.5"] if small else []
    return odd + ([f"{long} images are more than three times as long as wide: most is cropped away"] if long else [])
