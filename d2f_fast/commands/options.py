"""Parse the options of a command into its dataclass: defaults, then the configuration file, then what was typed.

Options, types, defaults and help come from the fields of the dataclass and from the "Args" of its docstring. A field
that is itself a dataclass adds its own options.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from d2f_fast.config import OptionGroup, choice_of, spell_out_flags, words_of
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.unknown_options import refuse_unknown_options

CONFIG_HELP = (
    "YAML file with lines such as `seed: 1`, whose keys are options of this command. Options on the command line"
    " override those of the file. The default None reads no file."
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


class Option(NamedTuple):
    """Hold one option of a command: its dataclass field, its type and its help text."""

    field: dataclasses.Field[Any]
    hint: Any
    help: str


def description(options: type) -> str:
    """Return the docstring of a dataclass without its sections."""
    return inspect.cleandoc(options.__doc__ or "").partition("\n\nArgs:")[0]


def argument_texts(options: type) -> dict[str, str]:
    """Return the "Args" entries of a dataclass' docstring by name, each on one line."""
    section = inspect.cleandoc(options.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    parts = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def options_of(command: type) -> Iterator[Option]:
    """Yield the options of a command in the order of its fields; a nested dataclass yields its own options."""
    hints, texts = get_type_hints(command), argument_texts(command)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from options_of(hint)
        else:
            yield Option(field, hint, texts.get(field.name, ""))


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
    _refuse_values(arguments, {option.field.name: option.hint for option in options})
    given: dict[str, Any] = {}
    if path := _config_path(arguments):
        from d2f_fast.commands.config_file import option_value, read_config

        hints = {option.field.name: option.hint for option in options}
        read = read_config(path)
        given = {key: option_value(key, value, hints, path, name, foreign) for key, value in read.items()}
    # tyro takes most of the time of a start, so that `d2f --help` and a refused file do without.
    import tyro

    parsed: Any = tyro.cli(
        _grouped(options, given),
        prog=f"d2f {name}",
        description=description(command),
        args=spell_out_flags(arguments, (option.field.name for option in options if option.hint == (bool | None))),
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    typed = dataclasses.asdict(parsed)
    leaves = {key: value for group in typed.values() if isinstance(group, dict) for key, value in group.items()}
    return _construct(command, typed | leaves)


def _refuse_values(arguments: Sequence[str], hints: Mapping[str, Any]) -> None:
    """Refuse a number or a word that an option does not take, in one line, where tyro would print a box.

    Args:
        arguments: words after the command's name, all of whose options are known.
        hints: type of each option by name. Those that are no number and no `Literal`, alone or in a union with None,
            are left to tyro.

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
        number = next((part for part in (int, float) if part in parts), None)
        if number is None and not words:
            continue
        if not inline:
            value = next(iter(arguments[position + 1 :]), "--")
        if value.startswith("--"):
            raise RefusedInputError(f"--{name} needs a value: give {choice_of(words) if words else 'a number'}")
        if value == "None" and type(None) in parts:
            continue
        if words and value not in words:
            raise RefusedInputError(f"{name} must be {choice_of(words)}, got {printable(value)}")
        if number is not None and not _is_number(value, number):
            kind = "a whole number" if number is int else "a number"
            raise RefusedInputError(f"{name} must be {kind}, got {printable(value)}")


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


def _grouped(options: Sequence[Option], given: Mapping[str, Any]) -> type:
    """Return a dataclass of the options as tyro takes them, with a nested dataclass for each titled group.

    Args:
        options: options of the command.
        given: values that replace the defaults, by option name.
    """
    import tyro

    # Keyword arguments allow any order of fields; without comparison and text it is made faster.
    make_dataclass = partial(dataclasses.make_dataclass, kw_only=True, eq=False, repr=False)

    def declared(name: str, hint: Any, default: Any, text: str, metavar: str | None = None) -> tuple[str, Any, Any]:
        if get_origin(hint) in (Union, UnionType):
            # With None first, tyro accepts a default of None without loading typeguard, which takes longer than tyro.
            hint = Union[tuple(sorted(get_args(hint), key=lambda part: part is not NoneType))]  # noqa: UP007
        return name, Annotated[hint, tyro.conf.arg(help=text, metavar=metavar)], dataclasses.field(default=default)

    config = declared("config", str | None, None, CONFIG_HELP, metavar="FILE")
    groups: dict[str | None, list[tuple[str, Any, Any]]] = {None: [config]}
    for field, hint, text in options:
        default = given.get(field.name, field.default)
        group = groups.setdefault(field.metadata.get("group"), [])
        is_positional, positional = field.metadata.get("positional"), cast(Any, tyro.conf.Positional)
        metavar = field.name.upper() if is_positional else None
        group.append(declared(field.name, positional[hint] if is_positional else hint, default, text, metavar))
    titled = [
        (f"group_{i}", Annotated[make_dataclass(title, groups[title]), tyro.conf.arg(name=title, help="")])
        for i, title in enumerate(get_args(OptionGroup))
        if title in groups
    ]
    return make_dataclass("Options", [*titled, *groups[None]])


def _construct(options: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass, and those nested in it, of the values of its options."""
    members = {
        name: _construct(hint, values) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else values[name]
        for name, hint in get_type_hints(options).items()
    }
    return options(**members)
