"""Checks of images with depth that all sources share."""

import numpy as np
import pytest
from PIL import Image

from d2f_fast.data.depth_source import check_sizes
from d2f_fast.errors import DatasetError


def test_image_and_depth_of_different_sizes_are_refused() -> None:
    check_sizes(Image.new("RGB", (4, 3)), np.ones((3, 4), np.float32), "a", "b")
    with pytest.raises(DatasetError, match="a has 4x3 pixels and b 3x4: give both in the same size"):
        check_sizes(Image.new("RGB", (4, 3)), np.ones((4, 3), np.float32), "a", "b")
