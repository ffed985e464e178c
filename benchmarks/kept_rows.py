"""Refuse to put rows of a benchmark beside rows that other options made. Imports no torch."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

Options: TypeAlias = Mapping[str, object]


def options_of_files(paths: Iterable[Path]) -> dict[str, Options | None]:
    """Return the options in files .npz, whose entry "options" is JSON, by the names of the files.

    Args:
        paths: The files.
    """
    kept: dict[str, Options | None] = {}
    for path in sorted(paths):
        with np.load(path) as found:
            kept[str(path)] = json.loads(str(found["options"])) if "options" in found else None
    return kept


def same_options(kept: Mapping[str, Options | None], now: Options | None = None) -> None:
    """End the program with one line where rows were made with other options.

    Args:
        kept: Options of each row that there is, by the name of its file; None for one that does not state them.
        now: Options of the rows that are to be made; None to compare the rows that there are with the first of them.
    """
    now = json.loads(json.dumps(next(iter(kept.values()), None) if now is None else now)) or {}
    for name, options in kept.items():
        if options is None and now:
            sys.exit(f"{name} does not say with which options it was made: move it away, or choose another folder")
        for option in (option for option in now if options is not None and options.get(option) != now[option]):
            sys.exit(
                f"{name} was made with {option} {(options or {}).get(option)}, and others with {now[option]}: give the"
                " same options, or choose another folder"
            )
