"""Options of the depth: values that are refused."""

from typing import Any

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.data.depth_options import DepthOptions, check_depth_training
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


@pytest.mark.parametrize(
    "options", [{"sampling_shift": 2.0}, {"lora_format": "both"}, {"lora_format": "kohya"}], ids=str
)
def test_options_of_a_flow_from_noise_do_not_go_with_a_jump_from_zeros(options: dict[str, Any]) -> None:
    check_depth_training(TrainingConfig(**options))
    check_depth_training(TrainingConfig(distill=True, sampling_shift=1.0, lora_format="diffusers"))
    (name,) = options
    with pytest.raises(RefusedInputError, match=f"^{name} .* distill on depth.*: leave it out$"):
        check_depth_training(TrainingConfig(distill=True, **options))


def test_perceptual_loss_which_knows_no_valid_pixels_is_refused() -> None:
    with pytest.raises(RefusedInputError, match=r"lpips_weight compares whole images, .*, got 0\.5: leave it out"):
        check_depth_training(TrainingConfig(distill=True, lpips_weight=0.5))
