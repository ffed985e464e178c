"""Refuse options that a command does not have, with what to give in their place. Imports no torch."""

import difflib
from collections.abc import Collection, Mapping, Sequence

from d2f_fast.errors import RefusedInputError, printable

_MOST_SUGGESTIONS, _LEAST_LIKENESS, _LEAST_START = 3, 0.6, 3


def refuse_unknown_options(
    arguments: Sequence[str], program: str, names: Collection[str], foreign: Mapping[str, str]
) -> None:
    """Refuse a command line that gives an option which the command does not have.

    Args:
        arguments: words after the command's name.
        program: name of the command for the message, such as "d2f train".
        names: names of the command's options, with underscores. Each may begin with "no_".
        foreign: options of other programs and commands by name, each with what to do in its place.

    Raises:
        RefusedInputError: An option is unknown; the message has the nearest ones of this command.
    """
    if {"-h", "--help"} & set(arguments):
        return
    given = [word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")]
    unknown = [name for name in given if name and name not in names and name.removeprefix("no_") not in names]
    if unknown:
        refused = [
            f"--{printable(name)} is not an option of {program}: {advice(name, names, foreign)}"
            for name in dict.fromkeys(unknown)
        ]
        raise RefusedInputError(f"{'; '.join(refused)} ({program} --help lists all)")


def advice(name: str, names: Collection[str], foreign: Mapping[str, str]) -> str:
    """Return what to do in place of giving an unknown option.

    Args:
        name: unknown option, with underscores.
        names: names of the command's options.
        foreign: options of other programs and commands by name, each with what to do in its place.
    """
    if name in foreign:
        return foreign[name]
    near = sorted(names, key=lambda other: -_likeness(name, other))[:_MOST_SUGGESTIONS]
    near = [other for other in near if _likeness(name, other) >= _LEAST_LIKENESS]
    if not near:
        return "nothing is like it, leave it out"
    return f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(f'--{other}' for other in near)}"


def _likeness(name: str, other: str) -> float:
    """Return how alike two names are in [0, 1]: by their letters, by the words of one in the other, or by a start."""
    if len(name) >= _LEAST_START and other.startswith(name):
        return 1.0
    words = set(name.split("_"))
    by_letters = difflib.SequenceMatcher(None, name, other).ratio()
    return max(by_letters, 0.9 * len(words & set(other.split("_"))) / len(words))
