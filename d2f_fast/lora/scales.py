"""Find the scale of each layer of a LoRA file in peft's configuration, without trusting any number in it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.json_file import read_json
from d2f_fast.lora.file_keys import component_of
from d2f_fast.lora.patterns import PatternError, PatternTable
from d2f_fast.lora.source import PEFT_CONFIG

ADAPTER_METADATA = "lora_adapter_metadata"
_MAX_ALPHA = 1e6
_MAX_METADATA_CHARACTERS = 4 * 2**20


def checked_alpha(path: Path, key: str, alpha: float) -> float:
    """Return an alpha that can scale an update, or refuse it.

    Args:
        path: The LoRA file.
        key: Key of the layer, for the message.
        alpha: Number that scales the update.

    Raises:
        ModelError: The number is 0, which programs understand differently, not finite, or beyond a million.
    """
    if not 0 < abs(alpha) <= _MAX_ALPHA:
        raise ModelError(
            f"LoRA {path}: the alpha of {key} is {alpha:g}, not a number up to {_MAX_ALPHA:g} other than 0: the file is"
            " damaged"
        )
    return alpha


class PeftScales:
    """Scales that peft's configuration gives the layers of a file.

    Args:
        path: The LoRA file.
        header: Text entries of its header.

    Raises:
        ModelError: The configuration is not understood.
    """

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        self._path = path
        self._source, self._metadata = _adapter_metadata(path, header)
        self._tables: dict[tuple[str, str], PatternTable] = {}

    def alpha(self, key: str, name: str, rank: int, entry: str) -> float | None:
        """Return the alpha of a layer, or None where the file gives none.

        peft's rank-stabilised LoRA scales by alpha / sqrt(r): its alpha is multiplied by sqrt(r), so that alpha / r is
        the scale of every layer.

        Args:
            key: Key of the layer, for messages.
            name: Name of the layer.
            rank: Rank of the layer's matrices, which must be that of the configuration; 0 leaves it unchecked.
            entry: Name of alpha in the configuration of this kind of adapter.
        """
        expected = self.rank(key, name)
        if rank and expected and rank != expected:
            raise ModelError(
                f"LoRA {self._path}: {key} has rank {rank}, and {self._source} says {expected}: the file is damaged"
            )
        alpha = self._number(name, entry, "alpha_pattern")
        if alpha is None:
            return None
        alpha = checked_alpha(self._path, key, alpha)
        return alpha * math.sqrt(rank) if rank and self._entry(name, "use_rslora") else alpha

    def rank(self, key: str, name: str) -> int | None:
        """Return the rank of a layer in the configuration, or None where it gives none."""
        rank = self._number(name, "r", "rank_pattern")
        if rank is not None and not (1 <= rank <= 2**20 and rank == int(rank)):
            raise ModelError(
                f"LoRA {self._path}: {self._source} gives {key} the rank {rank:g}, not a whole number from 1 on: save"
                " the LoRA again"
            )
        return None if rank is None else int(rank)

    def _entry(self, name: str, entry: str) -> object:
        """Return an entry of the configuration of a layer's component, or None."""
        component = component_of(name)
        return self._metadata.get(f"{component}.{entry}", self._metadata.get(entry))

    def _number(self, name: str, entry: str, patterns: str) -> float | None:
        """Return a number of the configuration, by the layer's pattern where one matches."""
        common = self._entry(name, entry)
        if common is None:
            return None
        component = component_of(name)
        try:
            if (component, patterns) not in self._tables:
                self._tables[component, patterns] = PatternTable(_mapping(self._entry(name, patterns)))
            module = name.removeprefix(f"{component}.")
            value = self._tables[component, patterns].get(module, common)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{value!r} is not a number")
            return float(value)
        except (TypeError, OverflowError, PatternError) as error:
            raise ModelError(
                f"LoRA {self._path}: {entry} or {patterns} of {component} in {self._source} cannot be used"
                f" ({printable(_short(str(error)))}): save the LoRA again"
            ) from error


def _mapping(value: object) -> dict[str, object]:
    """Return a table of patterns, empty where there is none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a table")
    return value


def _adapter_metadata(path: Path, header: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return where peft's configuration of a file stands, and the configuration, empty where there is none."""
    text = header.get(ADAPTER_METADATA)
    if text is None:
        beside = path.parent / PEFT_CONFIG
        if not beside.is_file():
            return PEFT_CONFIG, {}
        source, metadata = PEFT_CONFIG, read_json(beside)
        _refuse_other_methods(path, metadata)
    else:
        source, metadata = "its header", None
        if len(text) <= _MAX_METADATA_CHARACTERS:
            try:
                metadata = json.loads(text)
            except (ValueError, RecursionError):
                metadata = None
    if not isinstance(metadata, dict):
        where = f"{ADAPTER_METADATA} in its header" if text is not None else source
        raise ModelError(f"LoRA {path}: {where} is not a JSON object: save the LoRA again")
    return source, metadata


def _refuse_other_methods(path: Path, config: object) -> None:
    """Refuse a folder of peft whose adapter is none of the kinds that are read."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if isinstance(kind, str) and kind.upper() not in ("LORA", "LOHA", "LOKR"):
        raise ModelError(
            f"LoRA {path}: {PEFT_CONFIG} says {printable(_short(kind))}, which is not read: merge it with peft first"
        )


def _short(text: str) -> str:
    """Return at most 120 characters of a text."""
    return text if len(text) <= 120 else f"{text[:117]}..."
