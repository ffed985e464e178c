"""What all sources of images with depth share: which units count, and the checks of a sample."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.depth_source import DepthLayout, DepthSample, DepthSource, check_sizes, check_units
from d2f_fast.errors import DatasetError


class Empty(DepthSource):
    """Source without images."""

    def _find(self) -> DepthLayout:
        return DepthLayout("empty", 100.0, 80.0, 20.0, nearest=0.5)

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> DepthSample:
        raise IndexError(index)

    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        raise IndexError(index)


def test_units_that_are_given_replace_those_of_the_layout(tmp_path: Path) -> None:
    source = Empty(tmp_path)
    assert (source.place, source.layout, source.scale, source.least, source.most) == (tmp_path, "empty", 100, 0, 80)
    source = Empty(str(tmp_path), scale=1.0, least=0.5, most=9.0)
    assert (source.place, source.scale, source.least, source.most) == (tmp_path, 1, 0.5, 9)


def test_depth_beyond_what_is_plausible_is_refused(tmp_path: Path) -> None:
    depth, valid = np.full((2, 2), 20.0, np.float32), np.ones((2, 2), bool)
    check_units(depth, valid, "a", Empty(tmp_path))
    with pytest.raises(DatasetError, match="a: half of the pixels are beyond 21 m, and 20 m is the most that can be"):
        check_units(depth + 1, valid, "a", Empty(tmp_path))
    with pytest.raises(DatasetError, match=r"a: half of the pixels are nearer than 0\.2 m, and 0\.5 m is the least"):
        check_units(depth / 100, valid, "a", Empty(tmp_path))
    with pytest.raises(DatasetError, match=r"a: no pixel has a depth between 0.5 and 80 m \(they are around 20 m\)"):
        check_units(depth, ~valid, "a", Empty(tmp_path, least=0.5))


def test_image_and_depth_of_different_sizes_are_refused() -> None:
    check_sizes(Image.new("RGB", (4, 3)), np.ones((3, 4), np.float32), "a", "b")
    with pytest.raises(DatasetError, match="a has 4x3 pixels and b 3x4: give both in the same size"):
        check_sizes(Image.new("RGB", (4, 3)), np.ones((4, 3), np.float32), "a", "b")
