"""Read the YAML file of `--config`, and check its values against the types of the options."""

import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from d2f_fast.config import words_of
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.unknown_options import advice

MAX_CONFIG_BYTES = 1 << 15  # Every option with a long list of layers takes a third; this takes PyYAML 2 seconds.
MAX_NESTING = 10
_SWITCHES = (("no", "yes"), ("off", "full"))  # words for false and true
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def _compose_node(loader: Any, parent: yaml.Node | None, index: Any) -> yaml.Node:
    """Compose a node, unless it is an alias or lies too deep.

    A few lines of nested aliases could make billions of values, and PyYAML's time grows with the square of the depth.
    """
    line = loader.peek_event().start_mark.line + 1
    if loader.check_event(yaml.AliasEvent):
        raise yaml.YAMLError(f"line {line} uses the alias *{loader.peek_event().anchor}; write its value out")
    loader.depth = getattr(loader, "depth", 0) + 1
    if loader.depth > MAX_NESTING:
        raise yaml.YAMLError(f"line {line} is nested more than {MAX_NESTING} deep; no option is")
    node = yaml.SafeLoader.compose_node(loader, parent, index)
    loader.depth -= 1
    return node


_Loader: Any = type("_Loader", (yaml.SafeLoader,), {"compose_node": _compose_node})
# PyYAML follows YAML 1.1, which takes a number with an exponent and no point for text; YAML 1.2 does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of `option: value` lines.

    Args:
        path: file of at most 32 KiB, UTF-8.

    Returns:
        The values by key, as plain YAML types.

    Raises:
        RefusedInputError: The file is missing, too large, not YAML or not a mapping, or it uses an alias or gives a key
            twice, or nests its values more than 10 deep.
    """
    where = printable(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise RefusedInputError(f"--config {where} cannot be read ({error.strerror}): check the path") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise RefusedInputError(f"--config {where} is larger than 32 KiB: keep only `option: value` lines in it")
    try:
        loader = _Loader(content.decode("utf-8-sig"))
        root = loader.get_single_node()
        values = None if root is None else loader.construct_document(root)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RefusedInputError(f"--config {where} cannot be read as YAML; correct it: {reason}") from error
    if not isinstance(values, dict):
        raise RefusedInputError(f"--config {where} must hold `option: value` lines, one for each option")
    if len(values) < len(root.value):
        names = Counter(str(key.value) for key, _ in root.value)
        repeated, _ = names.most_common(1)[0]
        raise RefusedInputError(
            f"--config {where} gives {printable(repeated[:200])} more than once: keep one of the lines"
        )
    return values


def option_value(
    name: str, value: Any, hints: Mapping[str, Any], path: Path, command: str, foreign: Mapping[str, str]
) -> Any:
    """Return a value of a configuration file as its option takes it.

    Args:
        name: key in the file.
        value: value in the file, a plain YAML type.
        hints: types of the command's options, by name.
        path: the file, for messages.
        command: the command's name, for messages.
        foreign: options of other programs and commands by name, each with what to do in its place.

    Raises:
        RefusedInputError: The command has no such option, or the value has another type than the option.
    """
    where = f"--config {printable(path)}: {printable(str(name)[:200])}"
    if name not in hints:
        instead = advice(str(name), hints, foreign)
        raise RefusedInputError(
            f"{where} is not an option of d2f {command}: {instead} (d2f {command} --help lists all)"
        )
    try:
        return _converted(value, hints[name])
    except (TypeError, OverflowError) as error:
        expected = _type_name(hints[name])
        raise RefusedInputError(f"{where} must be {expected}, got {reprlib.repr(value)}: correct the value") from error


def _converted(value: Any, hint: Any) -> Any:
    """Return a YAML value as a value of a type: a list becomes a tuple, and a whole number may become a float.

    Raises:
        TypeError: The value has another type.
    """
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            try:
                return _converted(value, part)
            except TypeError:
                continue
    elif words := words_of(hint):
        word = value
        if isinstance(value, bool):  # YAML reads a bare `no` or `off` as false
            word = next((pair[value] for pair in _SWITCHES if pair[False] in words), value)
        if isinstance(word, str) and word in words:
            return word
    elif get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_converted(item, get_args(hint)[0]) for item in value)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    """Return the name of a type for a message."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_type_name, get_args(hint)))
    if words := words_of(hint):
        return " or ".join(words)
    if get_origin(hint) is tuple:
        return f"a list of {_type_name(get_args(hint)[0])}"
    return _TYPE_NAMES[hint]
