"""Options of the depth: values that are refused."""

from typing import Any

import pytest

from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.errors import RefusedInputError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"depth_scale": 0.0}, "depth_scale must be positive and finite, got 0.0"),
        ({"depth_min": -1.0}, "depth_min must be at least 0, got -1.0"),
        ({"depth_max": float("nan")}, "depth_max must be positive and finite, got nan"),
        ({"depth_min": 2.0, "depth_max": 2.0}, "depth_max must be above depth_min 2.0, got 2.0"),
        ({"depth_normalization": "metric"}, "depth_normalization must be affine, log or disparity, got metric"),
    ],
)
def test_value_that_cannot_be_used_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        DepthOptions(**options)
