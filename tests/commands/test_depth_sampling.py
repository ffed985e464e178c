"""Options of predicting depth: the same ones in both commands, and values that are refused."""

import pytest

from d2f_fast.commands.depth_sampling import DepthSampling
from d2f_fast.commands.evaluate_depth import EvaluateDepth
from d2f_fast.commands.sample_depth import SampleDepth
from d2f_fast.errors import RefusedInputError
from d2f_fast.option_help import options_of


def test_both_commands_offer_the_same_options_of_prediction() -> None:
    sample, evaluate = (
        {option.field.name: (option.hint, option.help, option.field.default) for option in options_of(command)}
        for command in (SampleDepth, EvaluateDepth)
    )
    shared = {"model", "lora", "num_inference_steps", "seed", "sampler", "ensemble_size", "processing_resolution"}
    assert all(sample[name] == evaluate[name] and sample[name][1] for name in shared)


@pytest.mark.parametrize(
    ("name", "value"), [("num_inference_steps", 0), ("sampler", "ddim"), ("ensemble_size", 1001), ("seed", -1)]
)
def test_value_that_an_option_does_not_take_is_refused(name: str, value: object) -> None:
    with pytest.raises(RefusedInputError, match=f"{name} must be"):
        DepthSampling("model", **{name: value})  # type: ignore[arg-type]
