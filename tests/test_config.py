"""Options of a training run: their checks, and the words and groups that the command line derives from them."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import pytest

from d2f_fast.config import (
    LearningRateSchedule,
    ObjectiveName,
    OptionGroup,
    TrainingConfig,
    check_options,
    option,
    words_of,
)
from d2f_fast.errors import RefusedInputError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"objective": "other"}, "objective must be diff2flow, fm or diffusion, got other"),
        ({"fm_form": "other"}, "fm_form must be diffusers or published, got other"),
        ({"sampling_shift": 0.0}, "sampling_shift must be positive and finite, got 0.0"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16, got fp16"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"resolution": 7}, "resolution must be at least 8, got 7"),
        ({"seed": 2**63}, "seed must be in [0, 2**63), got 9223372036854775808"),
        ({"ema_decay": 1.0}, "ema_decay must be in [0, 1), got 1.0"),
        ({"caption_dropout": math.nan}, "caption_dropout must be in [0, 1), got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, got inf"),
        ({"logit_mean": math.inf}, "logit_mean must be finite, got inf"),
    ],
    ids=str,
)
def test_bad_training_option_is_refused(options, sentence):
    with pytest.raises(RefusedInputError) as error:
        TrainingConfig(**options)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": None},
        {"mixed_precision": None},
        {"mixed_precision": "no"},
        {"checkpoints_total_limit": None},
        {"lora_alpha": None},
        {"ema_decay": 0},
    ],
    ids=str,
)
def test_good_training_options_are_accepted(options):
    config = TrainingConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())


def test_recommended_shift_is_that_of_the_training_unless_another_is_given():
    assert TrainingConfig(flow_shift=2.5).recommended_shift == 2.5
    assert TrainingConfig(flow_shift=2.5, sampling_shift=6.0).recommended_shift == 6.0


def test_every_training_option_has_a_group():
    assert {field.metadata["group"] for field in fields(TrainingConfig)} <= set(get_args(OptionGroup))


def test_words_are_those_of_the_literal_type():
    assert words_of(ObjectiveName) == ("diff2flow", "fm", "diffusion")
    assert words_of(Literal["no", "bf16"] | None) == ("no", "bf16")
    assert words_of(LearningRateSchedule) == get_args(LearningRateSchedule)
    assert words_of(str) == words_of(tuple[str, ...] | None) == ()


def test_check_of_an_option_is_given_its_name_and_value():
    seen = []

    @dataclass
    class Options:
        size: int = option(None, 3, lambda name, value: seen.append((name, value)))
        name: str = option("model", "x")

    check_options(Options())
    assert seen == [("size", 3)]
