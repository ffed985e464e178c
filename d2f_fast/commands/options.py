"""Parse the options of a command into its dataclass: defaults, then the configuration file, then what was typed."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from d2f_fast.config import OptionGroup, choice_of, words_of
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.option_help import Option, options_of, parse_groups, spell_out_words
from d2f_fast.unknown_options import refuse_unknown_options

CONFIG_HELP = (
    "YAML file with lines such as `seed: 1`, `lora: [a, b]` or `json: true`. Its keys are options of this command,"
    " without dashes; any other key is an error. Options on the command line replace those of the file. Default: none."
)


class Command(Protocol):
    """Describe what every command is: a dataclass of options that has a `run` method."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def dry_run(self) -> bool:
        """Return whether the options are printed in place of running the command."""

    @property
    def json(self) -> bool:
        """Return whether the result is printed as JSON."""

    def check(self) -> None:
        """Refuse what can be refused without the network, before torch is imported."""

    def run(self) -> dict[str, Any]:
        """Do the work, and return the result; its "output" is the path that was written."""


CommandType = TypeVar("CommandType", bound=Command)
T = TypeVar("T")


def parse_options(
    command: type[CommandType], arguments: Sequence[str], name: str, foreign: Mapping[str, str]
) -> CommandType:
    """Make a command of what was typed after its name.

    Args:
        command: dataclass of the command.
        arguments: words after the command's name.
        name: the command's name as it is typed, such as "train".
        foreign: options of other programs and commands by name, each with what to do in its place.

    Returns:
        The command with its options: those typed, else those of the file given by `--config`, else the defaults.

    Raises:
        RefusedInputError: The command has no such option, the configuration file cannot be used, or an option has a
            value that it does not take.
        SystemExit: The arguments cannot be parsed (2), or help was asked for (0).
    """
    options = list(options_of(command))
    names = ("config", *(option.field.name for option in options))
    refuse_unknown_options(arguments, f"d2f {name}", names, foreign)
    arguments = spell_out_words(arguments, options)
    _refuse_values(arguments, {option.field.name: option.hint for option in options})
    _refuse_repeated(arguments, [option.field.name for option in options if get_origin(option.parts[0]) is tuple])
    given: dict[str, Any] = {}
    if path := _config_path(arguments):
        from d2f_fast.commands.config_file import option_value, read_config

        hints = {option.field.name: option.hint for option in options}
        read = read_config(path)
        given = {key: option_value(key, value, hints, path, name, foreign) for key, value in read.items()}
    return _construct(command, parse_groups(command, _grouped(options), arguments, f"d2f {name}", given))


def _refuse_values(arguments: Sequence[str], hints: Mapping[str, Any]) -> None:
    """Refuse a number or a word that an option does not take, in one line, where tyro would print a box.

    Args:
        arguments: words after the command's name, all of whose options are known.
        hints: type of each option by name. Only the values of numbers and of `Literal`, alone or in a union with
            None, are checked here; tyro checks the others.

    Raises:
        RefusedInputError: A value is missing or of another type.
    """
    for position, word in enumerate(arguments):
        given, inline, value = word.partition("=")
        name = given.removeprefix("--").replace("-", "_")
        if not given.startswith("--") or name not in hints:
            continue
        parts = {hints[name], *get_args(hints[name])} if type(None) in get_args(hints[name]) else {hints[name]}
        words = words_of(hints[name])
        several = {get_args(part)[0] for part in parts if get_origin(part) is tuple}
        number = next((part for part in (int, float) if part in parts | several), None)
        if number is None and not words:
            continue
        following = list(itertools.takewhile(lambda word: not word.startswith("--"), arguments[position + 1 :]))
        values = [value] if inline else following if several else following[:1]
        if not values or values[0].startswith("--"):
            raise RefusedInputError(f"--{name} needs a value: give {choice_of(words) if words else 'a number'}")
        if values == ["None"] and type(None) in parts:
            continue
        if words and values[0] not in words:
            raise RefusedInputError(f"{name} must be {choice_of(words)}, got {printable(values[0])}")
        wrong = next((each for each in values if number is not None and not _is_number(each, number)), None)
        if wrong is not None:
            kind = "a whole number" if number is int else "a number"
            raise RefusedInputError(f"{name} must be {kind}, got {printable(wrong)}")


def _refuse_repeated(arguments: Sequence[str], names: Iterable[str]) -> None:
    """Refuse an option of several values that is given twice, because tyro would keep the last ones alone.

    Args:
        arguments: words after the command's name.
        names: options of several values.

    Raises:
        RefusedInputError: One of them is given more than once.
    """
    given = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments if word[:2] == "--"]
    for name in names:
        if given.count(name) > 1:
            raise RefusedInputError(f"--{name} was given more than once: give all its values after one --{name}")


def _is_number(text: str, kind: type[int] | type[float]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _config_path(arguments: Sequence[str]) -> Path | None:
    """Return the path that follows `--config`; None where it was not given.

    Raises:
        RefusedInputError: `--config` was given without a path, or more than once.
    """
    found = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"]
    if not found:
        return None
    if len(found) > 1:
        raise RefusedInputError("--config was given more than once: put the options into one file")
    _, inline, path = arguments[found[0]].partition("=")
    if not inline:
        path = next(iter(arguments[found[0] + 1 :]), "")
    if not path or path.startswith("--"):
        raise RefusedInputError("--config: give the path of a YAML file")
    return Path(path)


def _grouped(options: Iterable[Option]) -> dict[str | None, list[Option]]:
    """Return the options by the title of their group, in the order of the help; those of None have no title."""
    config: Any = dataclasses.field(default=None, metadata={"metavar": "FILE"})
    config.name = "config"
    groups: dict[str | None, list[Option]] = {title: [] for title in (None, *get_args(OptionGroup))}
    groups["other"].append(Option(config, str | None, CONFIG_HELP))
    for option in options:
        groups[option.field.metadata.get("group")].append(option)
    return {title: group for title, group in groups.items() if group}


def _construct(options: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass, and those nested in it, of the values of its options."""
    members = {
        name: _construct(hint, values) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else values[name]
        for name, hint in get_type_hints(options).items()
    }
    return options(**members)
