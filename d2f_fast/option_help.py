"""Turn a dataclass of options into a command line of tyro, and write its help. tyro is imported when it is needed.

Options, types, defaults and help come from the fields of the dataclass and from the "Args" of its docstring. A field
that is itself a dataclass adds its own options. A text may end with "Default: " and what a default of None means. The
help ends with the command lines of the section "Examples".
"""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from d2f_fast.config import (
    MAX_GUIDANCE,
    check_finite,
    check_fraction,
    check_guidance,
    check_positive,
    check_seed,
    words_of,
)

# What the help says about a whole group, by its title.
_NOTES: Mapping[str, str] = {
    "model": "They say what the model's own files do not, or replace it. Most models need none of them.",
    "LoRA": "With --adapter full they are an error.",
    "method": (
        "Flow time t goes from 0 (pure noise) to 1 (image), the opposite way to a diffusion model's timesteps. The"
        " velocity is the latents of the image minus the noise: the direction from noise to image. The defaults suit"
        " most runs."
    ),
    "teacher": "The network can learn the velocity of another model in place of that of the data. All need --teacher.",
    "depth": "They need --task depth.",
    "image to image": "They need --task image_to_image.",
    "sampling": "Flow time t goes from 0 (pure noise) to 1 (image).",
}
_DEFAULT = " Default: "
# Values of options that may stand on the command line without one.
_WITHOUT_A_WORD = {"compile": "full"}
_PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "TEXT"}
_RANGES: Mapping[Callable[[str, Any], None], str] = {
    check_positive: "above 0",
    check_fraction: "from 0 to below 1",
    check_guidance: f"0, or from 1 to {MAX_GUIDANCE:g}",
    check_seed: "from 0 to 2**63 - 1",
}


class Option(NamedTuple):
    """Hold one option of a command: its dataclass field, its type and its help text."""

    field: dataclasses.Field[Any]
    hint: Any
    help: str

    @property
    def parts(self) -> tuple[Any, ...]:
        """Return the types that a value may have, without None."""
        is_union = get_origin(self.hint) in (Union, UnionType)
        return tuple(part for part in get_args(self.hint) if part is not NoneType) if is_union else (self.hint,)

    @property
    def takes_none(self) -> bool:
        """Return whether the value may be None."""
        return NoneType in get_args(self.hint)


def description(options: type) -> str:
    """Return the docstring of a dataclass without its sections."""
    return re.split(r"\n\n(?:Args|Examples):\n", inspect.cleandoc(options.__doc__ or ""))[0]


def purpose(options: type) -> str:
    """Return the first sentence of a dataclass' docstring."""
    return description(options).partition("\n\n")[0]


def examples(options: type) -> list[str]:
    """Return the command lines in the section "Examples" of a dataclass' docstring."""
    section = inspect.cleandoc(options.__doc__ or "").partition("\nExamples:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in section.splitlines()]


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


def spell_out_flags(arguments: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return arguments in which a flag of three states has its value, which tyro asks for.

    Args:
        arguments: words of a command line.
        names: options of the type `bool | None`. `--name` becomes `--name True`, and `--no_name` becomes
            `--name False`; a value that follows `--name` stays.
    """
    flags = {f"{prefix}{name}": (name, value) for name in names for prefix, value in (("", "True"), ("no_", "False"))}
    spelled: list[str] = []
    for i, word in enumerate(arguments):
        found = flags.get(word.removeprefix("--").replace("-", "_")) if word.startswith("--") else None
        if found is None or (found[1] == "True" and arguments[i + 1 : i + 2] in (["True"], ["False"], ["None"])):
            spelled.append(word)
        else:
            spelled += [f"--{found[0]}", found[1]]
    return spelled


def spell_out_words(arguments: Sequence[str], options: Iterable[Option]) -> list[str]:
    """Return arguments in which an option that may stand without a value has its value.

    Args:
        arguments: words of a command line.
        options: options of the command. `--compile` alone becomes `--compile full`, `--no_compile` becomes
            `--compile off`.
    """
    alone: dict[str, list[str]] = {}
    for name, default in ((option.field.name, option.field.default) for option in options):
        if name in _WITHOUT_A_WORD:
            alone |= {name: [f"--{name}", _WITHOUT_A_WORD[name]], f"no_{name}": [f"--{name}", str(default)]}
    spelled: list[str] = []
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        name = word.removeprefix("--").replace("-", "_") if word.startswith("--") else ""
        has_value = not (following.startswith("--") or name.startswith("no_"))
        spelled += [word] if name not in alone or has_value else alone[name]
    return spelled


def parse_groups(
    command: type,
    groups: Mapping[str | None, Sequence[Option]],
    arguments: Sequence[str],
    program: str,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the values of all options by name.

    Args:
        command: dataclass whose docstring explains the program.
        groups: options by the title of their group in the help; those of None have no title.
        arguments: words after the program's name.
        program: name that the help shows.
        given: values that replace the defaults, by option name.

    Raises:
        SystemExit: The arguments cannot be parsed (2), or the help was printed (0).
    """
    # tyro takes most of the time of a start, so that `d2f --help` and a refused file do without.
    import tyro

    options = [option for group in groups.values() for option in group]
    # Each paragraph is one line: tyro keeps the end of a line before a word that begins with no letter.
    first, *rest = (" ".join(paragraph.split()) for paragraph in description(command).split("\n\n"))
    try:
        parsed: Any = tyro.cli(
            _dataclass_of(groups, given, "\n\n".join(rest)),
            prog=program,
            description=first,
            args=spell_out_flags(arguments, [option.field.name for option in options if option.hint == (bool | None)]),
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as end:
        if end.code == 0 and (lines := examples(command)):
            print("examples:", *lines, sep="\n  ")
        raise
    typed = dataclasses.asdict(parsed)
    return typed | {key: value for group in typed.values() if isinstance(group, dict) for key, value in group.items()}


def _dataclass_of(groups: Mapping[str | None, Sequence[Option]], given: Mapping[str, Any], introduction: str) -> type:
    """Return a dataclass of the options as tyro takes them, with a nested dataclass for each titled group.

    Args:
        groups: options by the title of their group.
        given: values that replace the defaults, by option name.
        introduction: text above the first titled group, in whose box tyro wraps it.
    """
    import tyro

    # Keyword arguments allow any order of fields; without comparison and text it is made faster.
    make_dataclass = partial(dataclasses.make_dataclass, kw_only=True, eq=False, repr=False)
    fields: list[tuple[str, Any, Any]] = [_declared(option, given) for option in groups.get(None, ())]
    titled: list[tuple[str, Any]] = []
    for title, options in groups.items():
        if title is not None:
            group = make_dataclass(f"Group{len(titled)}", [_declared(option, given) for option in options])
            note = "\n\n".join(part for part in (introduction, _NOTES.get(title)) if part)
            titled.append((f"group_{len(titled)}", Annotated[group, tyro.conf.arg(name=title, help=note)]))
            introduction = ""
    return make_dataclass("Options", [*titled, *fields])


def _declared(option: Option, given: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return the name, the type and the default of an option as tyro takes them."""
    import tyro

    (name, metadata), hint = (option.field.name, option.field.metadata), option.hint
    default = given.get(name, option.field.default)
    shown: dict[str, Any] = {"metavar": placeholder(option), "help_behavior_hint": hint_of(option, given)}
    if hint == (bool | None):  # It is written as other flags are, and `spell_out_flags` gives it its value.
        shown |= {"name": f"no_{name}", "aliases": (f"--{name}",)}
    if len(option.parts) > 1 or option.takes_none:
        # With None first, tyro accepts a default of None without loading typeguard, which takes longer than tyro.
        hint = Union[tuple(sorted(get_args(hint), key=lambda part: part is not NoneType))]  # noqa: UP007
    if metadata.get("positional"):
        hint = cast(Any, tyro.conf.Positional)[hint]
    if metadata.get("repeated"):
        hint = cast(Any, tyro.conf.UseAppendAction)[hint]
    return (
        name,
        Annotated[hint, tyro.conf.arg(help=option.help.partition(_DEFAULT)[0], **shown)],
        dataclasses.field(default=default),
    )


def placeholder(option: Option) -> str | None:
    """Return what stands for the value of an option in the help; None leaves it to tyro.

    Args:
        option: option of a command. Its metadata may name the placeholder, as "metavar".
    """
    if option.field.metadata.get("positional"):
        return option.field.name.upper()
    if option.hint == (bool | None):
        return ""
    part, named = option.parts[0], option.field.metadata.get("metavar")
    if words := words_of(part):
        choice = named or f"{{{','.join(map(str, words))}}}"
        return f"[{choice}]" if option.field.name in _WITHOUT_A_WORD else choice
    is_tuple = get_origin(part) is tuple
    one = named or _PLACEHOLDERS.get(get_args(part)[0] if is_tuple else part)
    return f"{one} ..." if Ellipsis in get_args(part) and not option.field.metadata.get("repeated") else one


def hint_of(option: Option, given: Mapping[str, Any]) -> str:
    """Return the limits and the default of an option, in brackets.

    Args:
        option: option of a command.
        given: values of the configuration file, by option name.
    """
    name, check = option.field.name, option.field.metadata.get("check")
    limits = "" if check is None else limits_of(check)
    if limits and option.takes_none and option.field.default is not None:
        limits += ", or None"
    explained = option.help.partition(_DEFAULT)[2].removesuffix(".")
    value = given.get(name, option.field.default)
    if explained and name not in given:
        shown = explained
    elif isinstance(value, bool):
        shown = "on" if value else "off"
    else:
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    default = f"{'from the file' if name in given else 'default'}: {shown}"
    return f"({'; '.join(part for part in (limits, default) if part)})"


def limits_of(check: Callable[[str, Any], None]) -> str:
    """Return the range of numbers that a check accepts.

    Args:
        check: check of an option, as `config.option` takes it.
    """
    if not isinstance(check, partial):
        return _RANGES[check]
    # A large number is a power of ten, or is written without commas, at which tyro would break the line.
    most = f"{check.keywords['most']:.10g}"
    most = re.sub(r"^10{6,}$", lambda found: f"10**{len(found[0]) - 1}", most)
    if check.func is check_positive:
        return f"above 0, at most {most}"
    if check.func is check_finite:
        return f"from -{most} to {most}"
    return f"from {check.keywords['least']:.10g} to {most}"
