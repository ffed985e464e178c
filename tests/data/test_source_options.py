"""Options of a flow that starts from an image."""

import math

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.data.source_options import SourceOptions, check_source_training, options_for_source
from d2f_fast.errors import RefusedInputError


@pytest.mark.parametrize("source_noise", [-0.1, 1.1, math.nan])
def test_share_of_noise_is_between_0_and_1(source_noise: float) -> None:
    with pytest.raises(RefusedInputError, match="source_noise must be at"):
        SourceOptions(source_noise)


def test_lora_is_written_for_diffusers_unless_another_form_is_given() -> None:
    assert options_for_source(TrainingConfig()).lora_format == "diffusers"
    assert options_for_source(TrainingConfig(lora_format="both")).lora_format == "both"
    assert options_for_source(TrainingConfig(adapter="full")).lora_format is None


def test_objective_that_starts_from_noise_and_a_teacher_are_refused() -> None:
    check_source_training("diff2flow", has_teacher=False)
    check_source_training(None, has_teacher=False)
    with pytest.raises(RefusedInputError, match=r"objective diffusion always starts from noise, .* give --objective"):
        check_source_training("diffusion", has_teacher=False)
    with pytest.raises(RefusedInputError, match="teacher does not go with --task image_to_image: leave it out"):
        check_source_training("fm", has_teacher=True)
