"""Options of sampling: pairs of which one makes the other void, and sizes that the model does not have."""

import subprocess
import sys

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.options import check_jump, check_negative_prompt, check_steps, image_size


@pytest.mark.parametrize("guidance_scale", [0, 1])
def test_negative_prompt_without_guidance_is_refused(guidance_scale: float) -> None:
    check_negative_prompt("", guidance_scale)
    check_negative_prompt("grey", 1.5)
    with pytest.raises(RefusedInputError, match=f"no effect with guidance_scale {guidance_scale}: leave it out, or"):
        check_negative_prompt("grey", guidance_scale)


def test_single_step_of_a_method_with_two_evaluations_is_refused() -> None:
    check_steps("euler", 1)
    check_steps("heun", 2)
    with pytest.raises(
        RefusedInputError, match=r"method midpoint needs at least 2 num_inference_steps, .* leave method"
    ):
        check_steps("midpoint", 1)


@pytest.mark.parametrize(
    ("given", "sample_size", "expected"),
    [
        ((None, None), 64, (None, None)),
        ((256, None), 64, (256, 512)),
        ((None, 256), [32, 64], (256, 256)),
        ((256, 128), None, (256, 128)),
    ],
)
def test_size_is_completed_by_that_of_the_model(given: tuple, sample_size: object, expected: tuple) -> None:
    assert image_size(*given, sample_size, 8) == expected


@pytest.mark.parametrize(
    ("given", "sample_size", "sentence"),
    [
        ((36, None), 64, "height must be a positive multiple of 8, got 36"),
        ((64, 0), 64, "width must be a positive multiple of 8, got 0"),
        ((None, None), None, "has sample_size None, and does not say the size of its images: give height and width"),
        ((64, None), [64], r"has sample_size \[64\], and does not say"),
    ],
)
def test_size_that_the_model_does_not_have_is_refused(given: tuple, sample_size: object, sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        image_size(*given, sample_size, 8)


def test_size_of_the_model_at_which_no_pipeline_generates_is_refused() -> None:
    for given in ((None, None), (64, None)):
        with pytest.raises(
            RefusedInputError,
            match="the width that the model was made for, 36 pixels, is not a multiple of 8: give height and width",
        ):
            image_size(*given, (64, 9), 4)


def test_jump_from_zeros_takes_one_step_and_one_prediction() -> None:
    check_jump("one_step", "steps", None)
    check_jump("one_step", "steps", 1, 1)
    with pytest.raises(RefusedInputError, match=r"one_step was .* in one step, got steps 4: leave steps out"):
        check_jump("one_step", "steps", 4)
    with pytest.raises(RefusedInputError, match=r"ensemble_size must be 1 with one_step, .* got 10: leave it"):
        check_jump("one_step", "steps", None, 10)


def test_options_are_checked_without_torch() -> None:
    code = "import d2f_fast.sampling.options, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
