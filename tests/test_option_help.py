"""Help of the options: placeholders, limits and defaults, and flags of three states."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from d2f_fast.config import (
    TrainingConfig,
    at_least,
    check_fraction,
    check_guidance,
    check_positive,
    check_seed,
    finite,
    option,
    positive,
)
from d2f_fast.option_help import (
    Option,
    argument_texts,
    description,
    examples,
    hint_of,
    limits_of,
    options_of,
    parse_groups,
    placeholder,
    purpose,
    spell_out_flags,
    spell_out_words,
)


@dataclass(frozen=True)
class Group:
    """Hold two options of a group.

    Args:
        scale: Factor on the other number, or so.
        turned: Turn the number around. Default: as it was.
    """

    scale: float = option(None, 0.5, check_fraction)
    turned: bool | None = None


@dataclass(frozen=True)
class Program:
    """Count to a number.

    It is fast, and counts up to
    99 numbers; its explanation is long: %s.

    Args:
        source: File with numbers.
        number: Number to count to. Default: 5.
        names: Names to call. Default: nobody, or
            somebody.
        kind: Kind of counting. Default: as it comes.
        most: Largest number. The word None takes any.
        quiet: Say nothing.
        loud: Say it aloud.
        group: Further options.

    Examples:
        count a.txt --number 3
        count b.txt --turned
    """

    source: str = field(metadata={"positional": True})
    number: int | None = option(None, None, at_least(1, 1 << 14))
    names: tuple[str, ...] = option(None, (), metavar="NAME")
    kind: Literal["up", "down"] | None = None
    most: int | None = option(None, 2, at_least(1, 9))
    quiet: bool = False
    loud: bool = True
    group: Group = field(default_factory=Group)


Program.__doc__ = str(Program.__doc__) % " ".join(["word"] * 40)
OPTIONS = {each.field.name: each for each in options_of(Program)}


def parsed(*words: str, **given: Any) -> dict[str, Any]:
    """Return the values of the options of `Program` by name."""
    inner = [OPTIONS[name] for name in ("scale", "turned")]
    groups = {None: [each for each in OPTIONS.values() if each not in inner], "further": inner}
    return parse_groups(Program, groups, words, "count", given)


def test_docstring_gives_purpose_description_texts_and_examples():
    assert purpose(Program) == "Count to a number."
    assert description(Program).splitlines()[2].startswith("It is fast")
    assert argument_texts(Program)["most"] == "Largest number. The word None takes any."
    assert examples(Program) == ["count a.txt --number 3", "count b.txt --turned"]
    assert examples(TrainingConfig) == []


def test_values_are_typed_given_or_defaults():
    values = parsed("a.txt", "--number", "3", "--no-turned", "--names", "b", "c", scale=0.25)
    expected = {"source": "a.txt", "number": 3, "turned": False, "names": ("b", "c"), "scale": 0.25, "most": 2}
    assert {name: values[name] for name in expected} == expected
    assert parsed("a.txt", "--turned")["turned"] is True
    assert parsed("a.txt")["turned"] is None and parsed("a.txt", "--most", "None")["most"] is None


def test_help_shows_options_of_three_states_as_flags_and_ends_with_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--turned, --no_turned " in text and "--quiet, --no_quiet " in text
    assert "Number to count to. (from 1 to 16384; default: 5)" in " ".join(text.split())
    assert any("counts up to 99 numbers" in line for line in text.splitlines())
    assert "None}" not in text and "(default: None)" not in text and "{[" not in text
    assert text.endswith("examples:\n  count a.txt --number 3\n  count b.txt --turned\n")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("source", "SOURCE"),
        ("number", "INT"),
        ("names", "NAME ..."),
        ("kind", "{up,down}"),
        ("quiet", None),
        ("scale", "FLOAT"),
        ("turned", ""),
    ],
)
def test_placeholder_is_short(name, shown):
    assert placeholder(OPTIONS[name]) == shown


def test_named_placeholder_wins_and_a_repeated_option_takes_one_value():
    named = replace_metadata(OPTIONS["kind"], metavar="{up,down,round}")
    assert placeholder(named) == "{up,down,round}"
    assert placeholder(replace_metadata(OPTIONS["names"], repeated=True)) == "NAME"


def replace_metadata(old: Option, **metadata: Any) -> Option:
    """Return an option with other metadata."""
    new = field(default=old.field.default, metadata={**old.field.metadata, **metadata})
    new.name = old.field.name
    return old._replace(field=new)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("number", "(from 1 to 16384; default: 5)"),
        ("names", "(default: nobody, or somebody)"),
        ("kind", "(default: as it comes)"),
        ("most", "(from 1 to 9, or None; default: 2)"),
        ("quiet", "(default: off)"),
        ("loud", "(default: on)"),
        ("scale", "(from 0 to below 1; default: 0.5)"),
    ],
)
def test_hint_names_limits_and_default(name, hint):
    assert hint_of(OPTIONS[name], {}) == hint


def test_hint_says_that_a_value_is_from_the_file():
    given = {"number": 3, "names": ("a", "b"), "quiet": True}
    hints = [hint_of(OPTIONS[name], given) for name in given]
    assert hints == ["(from 1 to 16384; from the file: 3)", "(from the file: a b)", "(from the file: on)"]


@pytest.mark.parametrize(
    ("check", "limits"),
    [
        (at_least(0, 1000.0), "from 0 to 1000"),
        (at_least(1, 10**9), "from 1 to 10**9"),
        (positive(1.0), "above 0, at most 1"),
        (finite(1e6), "from -10**6 to 10**6"),
        (check_positive, "above 0"),
        (check_fraction, "from 0 to below 1"),
        (check_guidance, "0, or from 1 to 1000"),
        (check_seed, "from 0 to 2**63 - 1"),
    ],
)
def test_limits_are_those_of_the_check(check, limits):
    assert limits_of(check) == limits


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


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("--compile", "--compile full"),
        ("--compile --seed 3", "--compile full --seed 3"),
        ("--compile regional --seed 3", "--compile regional --seed 3"),
        ("--compile=regional", "--compile=regional"),
        ("--seed 3 --no-compile", "--seed 3 --compile off"),
        ("--cuda_graph compile", "--cuda_graph compile"),
    ],
)
def test_option_without_a_word_is_given_one(typed, spelled):
    assert spell_out_words(typed.split(), options_of(TrainingConfig)) == spelled.split()


def test_placeholder_of_a_word_that_may_be_left_out_is_in_brackets():
    found = {each.field.name: placeholder(each) for each in options_of(TrainingConfig)}
    assert found["compile"] == "[{off,full,regional}]" and found["adapter"] == "{lora,full}"
