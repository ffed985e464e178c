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
    spell_out_flags,
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
        ({"adapter": "full", "init_lora": "x"}, "init_lora needs --adapter lora: leave it out"),
        ({"resolution": 7}, "resolution must be at least 8, got 7"),
        ({"seed": 2**63}, "seed must be in [0, 2**63), got 9223372036854775808"),
        ({"ema_decay": 1.0}, "ema_decay must be in [0, 1), got 1.0"),
        ({"caption_dropout": math.nan}, "caption_dropout must be in [0, 1), got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, got inf"),
        ({"logit_mean": math.inf}, "logit_mean must be finite, got inf"),
        (
            {"objective": "fm", "loss_weighting": "native"},
            "loss_weighting must be flow with the objective fm, got native",
        ),
        (
            {"objective": "diffusion", "flow_shift": 2.5},
            "flow_shift must be 1.0 with the objective diffusion, got 2.5: leave it out, or give --sampling_shift",
        ),
        (
            {"objective": "diffusion", "loss_weighting": "min_snr"},
            "loss_weighting must be flow with the objective diffusion, got min_snr: leave it out",
        ),
        (
            {"objective": "diffusion", "timestep_sampling": "mode"},
            "timestep_sampling must be uniform with the objective diffusion, got mode: leave it out",
        ),
        (
            {"objective": "diff2flow", "fm_form": "published"},
            "fm_form published does not go with the objective diff2flow: add --objective fm, or leave fm_form out",
        ),
        ({"logit_mean": 0.5}, "logit_mean works only with timestep_sampling logit_normal, got uniform: add"),
        ({"logit_std": 2.0, "timestep_sampling": "mode"}, "logit_std works only with timestep_sampling logit_normal"),
        ({"snr_gamma": 3.0}, "snr_gamma works only with loss_weighting min_snr, got flow"),
        ({"center_crop": False}, "cache_latents needs center_crop"),
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
        {"objective": "fm", "fm_form": "published", "flow_shift": 2.5, "sampling_shift": 6.0},
        {"objective": "diffusion", "sampling_shift": 3.0},
        {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8},
        {"mixed_precision": None},
        {"mixed_precision": "no"},
        {"checkpoints_total_limit": None},
        {"lora_alpha": None},
        {"ema_decay": 0},
        {"center_crop": False, "cache_latents": False},
        {"snr_gamma": 3.0, "loss_weighting": "min_snr"},
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


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("--flag", "--flag True"),
        ("--no_flag", "--flag False"),
        ("--no-flag --other 3", "--flag False --other 3"),
        ("--flag --other 3", "--flag True --other 3"),
        ("--flag False", "--flag False"),
        ("--flag None", "--flag None"),
        ("--other --flags flag", "--other --flags flag"),
    ],
)
def test_flag_of_three_states_is_given_its_value(typed, spelled):
    assert spell_out_flags(typed.split(), ["flag"]) == spelled.split()
