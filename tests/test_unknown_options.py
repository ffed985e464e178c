"""Unknown options are refused with the nearest ones, or with what to give in place of another program's."""

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.unknown_options import advice, refuse_unknown_options

NAMES = ("rank", "max_train_steps", "logging_steps", "lora_alpha", "random_flip", "prompts")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rnak", "the nearest is --rank"),
        ("steps", "the nearest are --max_train_steps, --logging_steps"),
        ("prompt", "the nearest is --prompts"),
        ("random", "the nearest are --random_flip, --rank"),
        ("network_dim", "give --rank"),
        ("telescope", "nothing is like it, leave it out"),
    ],
)
def test_advice_names_the_nearest_options_or_the_one_that_serves(name, words):
    assert advice(name, NAMES, {"network_dim": "give --rank"}) == words


def test_each_unknown_option_is_named_once():
    arguments = ["--rank", "-3", "--network-dim=4", "--network_dim", "8", "--no_random_flip", "--telescope", "-1"]
    with pytest.raises(RefusedInputError) as refusal:
        refuse_unknown_options(arguments, "d2f train", NAMES, {"network_dim": "give --rank"})
    assert str(refusal.value) == (
        "--network_dim is not an option of d2f train: give --rank; --telescope is not an option of d2f train: nothing"
        " is like it, leave it out (d2f train --help lists all)"
    )


@pytest.mark.parametrize("arguments", [[], ["--rank", "3", "a", "-x", "--"], ["--oops", "--help"], ["-h", "--oops"]])
def test_known_options_and_questions_for_help_pass(arguments):
    refuse_unknown_options(arguments, "d2f train", NAMES, {})
