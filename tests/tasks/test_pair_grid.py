"""The grid of the first pairs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.tasks.pair_grid import CELL, write_grid

Write = Callable[..., Path]


def brightness(latents: Tensor) -> Tensor:
    """Decode latents to an image of one brightness, which the first number gives."""
    assert latents.shape[0] == 1 and latents.dtype == torch.float32
    return latents[:, :1, :1, :1].clamp(-1, 1).expand(1, 3, 16, 24)


@pytest.mark.parametrize(("count", "rows"), [(3, 1), (5, 2), (20, 4)])
def test_grid_shows_the_images_of_the_first_pairs(count: int, rows: int, write_pairs: Write, tmp_path: Path) -> None:
    shades = np.linspace(-1, 1, 20)
    made = iter(range(count))

    def shaded(record: object) -> object:
        latents = np.full((4, 8, 8), shades[next(made)], np.float32)
        return record._replace(latents=latents, prompt="a long prompt " * 20)  # type: ignore[attr-defined]

    shard = write_pairs(tmp_path / "000000.tar", count, dtype="float32", change=shaded)
    write_grid(tmp_path / "grid.png", shard, brightness)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"), float)
    height = grid.shape[0] // rows
    for position in range(min(count, 16)):
        left, top = 8 + position % 4 * (CELL + 8), 8 + position // 4 * height
        assert abs(grid[top + 20, left + 20] - (shades[position] + 1) * 127.5) < 1
    assert (grid[CELL + 8 : height] < 128).any() and grid.shape[1] < 4 * (CELL + 8) + 16
    first = (tmp_path / "grid.png").read_bytes()
    write_grid(tmp_path / "grid.png", shard, brightness)
    assert (tmp_path / "grid.png").read_bytes() == first


def test_large_images_are_made_smaller(write_pairs: Write, tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", write_pairs(tmp_path / "0.tar", 1), lambda latents: torch.ones(1, 3, 512, 768))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height < CELL + 60
