"""Options of a flow that starts from an image."""

import math
from typing import Any

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.data.source_options import SourceOptions, check_source_training
from d2f_fast.errors import RefusedInputError


@pytest.mark.parametrize("source_noise", [-0.1, 1.1, math.nan])
def test_share_of_noise_is_between_0_and_1(source_noise: float) -> None:
    with pytest.raises(RefusedInputError, match="source_noise must be at"):
        SourceOptions(source_noise)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"objective": "diffusion"}, "objective diffusion always starts from noise, .* give --objective"),
        ({"validation_prompts": ("a",), "validation_steps": 1}, "validation_prompts does not go with --task image_to"),
        ({"lora_format": "both"}, "lora_format both is for programs that start from noise: leave it out with --task"),
        ({"lora_format": "kohya"}, "lora_format kohya is for programs that start from noise"),
    ],
    ids=str,
)
def test_options_that_start_from_noise_are_refused(options: dict[str, Any], sentence: str) -> None:
    check_source_training(TrainingConfig(), has_teacher=False)
    check_source_training(TrainingConfig(objective="fm", lora_format="diffusers"), has_teacher=False)
    with pytest.raises(RefusedInputError, match=sentence):
        check_source_training(TrainingConfig(**options), has_teacher=False)


def test_teacher_is_refused() -> None:
    with pytest.raises(RefusedInputError, match="teacher does not go with --task image_to_image: leave it out"):
        check_source_training(TrainingConfig(), has_teacher=True)
