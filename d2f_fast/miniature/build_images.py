"""Write emoji as an image folder with captions, no larger than the originals: the stage `images` of `build.py`."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.atomic import atomic_folder
from d2f_fast.miniature import emoji
from d2f_fast.miniature.build_sheets import emoji_sources
from d2f_fast.models.base_model import to_pil

SPLITS = ("train", "test")


def build_images(npm: Path, output: Path, size: int, style: str, split: str, count: int | None = None) -> None:
    """Write images, and their captions in `metadata.jsonl`.

    Args:
        npm: the node_modules folder with `emoji-datasource-google` and `@lobehub/fluent-emoji-3d`.
        output: folder, which must not exist; it appears whole or not at all.
        size: side of the images in pixels, from 1 to that of the packages' images: 64 for "noto", 256 for "fluent".
        style: style of the emoji, one of `emoji.STYLES`.
        split: "train" for the (name, colour) combinations that the base model was trained on, "test" for those that
            were held out.
        count: number of images, chosen at random; None for all.

    Raises:
        RefusedInputError: the packages are missing or of another version, the size is below 1 or above that of their
            images, there are fewer images, or the folder exists.
    """
    if size < 1:
        raise RefusedInputError(f"size must be at least 1, got {size}: 64 is the largest for noto, 256 for fluent")
    try:
        sources = emoji_sources(npm)
    except FileNotFoundError as error:
        raise RefusedInputError(f"npm: {printable(error.filename)} is missing: give the node_modules folder") from error
    if [source.name for source in sources] != list(emoji.names()):
        raise RefusedInputError(
            f"npm: {printable(npm)} has other emoji than this package: install the versions that"
            " d2f_fast/miniature/build.py names"
        )
    files = {name: source.files[style] for name, source in enumerate(sources) if style in source.files}
    chosen = _combinations(list(files), split, count)
    with atomic_folder(output) as temporary:
        lines = []
        for number, (name, colour) in enumerate(chosen):
            background = torch.tensor([tuple(emoji.BACKGROUNDS.values())[colour]])
            (image,) = to_pil(emoji.composite(_sprite(files[name], size)[None], background))
            image.save(temporary / f"{number:05d}.png")
            lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": emoji.caption(name, colour)}))
        (temporary / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} images of {size} pixels in {output}")


def _combinations(names: list[int], split: str, count: int | None) -> list[tuple[int, int]]:
    """Return the (name, colour) combinations of a split, or some of them that are chosen at random."""
    held_out = emoji.held_out_pairs()
    all_pairs = [(name, colour) for name in names for colour in range(len(emoji.BACKGROUNDS))]
    pairs = [pair for pair in all_pairs if (pair in held_out) == (split == "test")]
    if count is None:
        return pairs
    if not 1 <= count <= len(pairs):
        raise RefusedInputError(f"count must be 1 to {len(pairs)} for the split {split}, got {count}")
    order = np.random.default_rng(emoji.SPLIT_SEED).permutation(len(pairs))
    return [pairs[position] for position in sorted(order[:count].tolist())]


def _sprite(path: Path, size: int) -> Tensor:
    """Return an emoji of a package, [4, size, size] uint8 RGBA.

    Raises:
        RefusedInputError: the image is smaller than the size.
    """
    with Image.open(path) as image:
        if min(image.size) < size:
            raise RefusedInputError(f"size {size}: {printable(path)} has {min(image.size)} pixels: give a smaller size")
        pixels = np.array(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(2, 0, 1)
