"""Show the first pairs of a folder: the images of their latents, with their prompts."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from d2f_fast.data.pair_shards import read_shard
from d2f_fast.files.atomic import atomic_path
from d2f_fast.models.base_model import to_pil

GRID_FILE = "grid.png"
COLUMNS, ROWS = 4, 4
CELL = 192  # Side of an image in the grid, in pixels.
_TEXT_LINES, _TEXT_COLUMNS, _LINE_HEIGHT = 3, 31, 12


def write_grid(path: Path, shard: Path, decode: Callable[[Tensor], Tensor]) -> None:
    """Write a grid of the first 16 pairs of a shard as a PNG file, whole or not at all.

    Args:
        path: File of the grid.
        shard: First shard of a folder.
        decode: Function from latents [1, C, h, w] in float32 on the CPU to images [1, 3, H, W] in [-1, 1].

    Raises:
        DatasetError: The shard cannot be read.
        RefusedInputError: The disk is full.
    """
    pairs = read_shard(shard)
    height = CELL + _TEXT_LINES * _LINE_HEIGHT + 8
    count = min(len(pairs), COLUMNS * ROWS)
    rows = -(-count // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (CELL + 8) + 8, rows * height + 8), "white")
    canvas = ImageDraw.Draw(grid)
    for position in range(count):
        pair = pairs.read(position)
        (image,) = to_pil(decode(torch.from_numpy(pair.latents.astype("float32"))[None]))
        left, top = 8 + position % COLUMNS * (CELL + 8), 8 + position // COLUMNS * height
        grid.paste(_fitted(image), (left, top))
        lines = textwrap.wrap(pair.prompt, _TEXT_COLUMNS, max_lines=_TEXT_LINES, placeholder=" …")
        canvas.multiline_text((left, top + CELL + 2), "\n".join(lines), fill="black", spacing=0)
    with atomic_path(path) as temporary:
        grid.save(temporary)


def _fitted(image: Image.Image) -> Image.Image:
    """Return an image that fits a cell: pixels of small images become whole squares, and large ones are averaged."""
    longer = max(image.size)
    if longer <= CELL:
        factor = CELL // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(
        (max(1, image.width * CELL // longer), max(1, image.height * CELL // longer)), Image.Resampling.LANCZOS
    )
