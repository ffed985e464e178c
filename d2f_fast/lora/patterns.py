"""Look up the number that peft's patterns give a module, in time that no pattern can make long.

peft takes the keys of `alpha_pattern` and `rank_pattern` for regular expressions: `(.*\\.)?(KEY)$` must match the name
of the module, and the first key that does so counts. A file from elsewhere could choose one that never ends, so that
none is run here. Understood are module names and their endings, with or without `^` and backslashes, and the wildcards
`.*` and `.+`.
"""

from collections.abc import Mapping
from typing import NamedTuple

MAX_WILDCARDS = 64  # keys with a wildcard in one table, each of which is tried on each module
_MAX_KEY_LENGTH = 500
_SPECIAL = frozenset("^$*+?{}[]()|")


class PatternError(ValueError):
    """A key that is neither a module name nor a pattern with plain wildcards."""


class _Wildcard(NamedTuple):
    """A key with wildcards: its literal parts, between any two of which the name has at least `gaps` characters."""

    order: int
    anchored: bool
    parts: tuple[str, ...]
    gaps: tuple[int, ...]

    def matches(self, name: str) -> bool:
        """Return whether the whole name, or with no anchor an ending of it after a dot, matches."""
        if self.anchored:
            return self._matches_from(name)
        return any(self._matches_from(name[at:]) for at in _starts(name))

    def _matches_from(self, text: str) -> bool:
        """Return whether a text begins with the first part, ends with the last, and has the others in between."""
        first, *middle, last = self.parts
        if not text.startswith(first) or not text.endswith(last):
            return False
        at = len(first)
        for gap, part in zip(self.gaps, middle, strict=False):
            at = text.find(part, at + gap)
            if at < 0:
                return False
            at += len(part)
        return at + self.gaps[-1] <= len(text) - len(last)


class PatternTable:
    """Table of numbers by pattern.

    Args:
        patterns: Numbers by key, in the order of the file.

    Raises:
        PatternError: A key is not understood, or there are more than 64 keys with wildcards.
    """

    def __init__(self, patterns: Mapping[str, object]) -> None:
        self._values = list(patterns.values())
        self._names: dict[str, int] = {}
        self._anchored: dict[str, int] = {}
        self._wildcards: list[_Wildcard] = []
        for order, key in enumerate(patterns):
            parts, gaps, anchored = _parse(key)
            if gaps:
                self._wildcards.append(_Wildcard(order, anchored, parts, gaps))
            else:
                (self._anchored if anchored else self._names).setdefault(parts[0], order)
        if len(self._wildcards) > MAX_WILDCARDS:
            raise PatternError(f"{len(self._wildcards)} keys have wildcards, at most {MAX_WILDCARDS} may")

    def get(self, name: str, default: object) -> object:
        """Return the value of the first key that matches a module, or the default."""
        found = [self._names[ending] for at in _starts(name) if (ending := name[at:]) in self._names]
        found += [self._anchored[name]] if name in self._anchored else []
        found += [wildcard.order for wildcard in self._wildcards if wildcard.matches(name)]
        return self._values[min(found)] if found else default


def _starts(name: str) -> list[int]:
    """Return the positions at which an ending of a module's name may begin."""
    return [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]


def _parse(key: str) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
    """Return the literal parts of a key, the least number of characters between them, and whether it is anchored."""
    if len(key) > _MAX_KEY_LENGTH:
        raise PatternError(f"a key has {len(key)} characters, at most {_MAX_KEY_LENGTH} are understood")
    anchored = key.startswith("^")
    rest = key.removeprefix("^").removesuffix("$")
    parts, gaps = [""], []
    at = 0
    while at < len(rest):
        letter, following = rest[at], rest[at + 1 : at + 2]
        if letter == "." and following in ("*", "+"):
            gaps.append(int(following == "+"))
            parts.append("")
            at += 2
        elif letter == "\\" and following and not following.isalnum():
            parts[-1] += following
            at += 2
        elif letter == "\\" or letter in _SPECIAL:
            raise PatternError(f"{key!r} is a regular expression other than a name with .* or .+")
        else:
            parts[-1] += letter
            at += 1
    return tuple(parts), tuple(gaps), anchored
