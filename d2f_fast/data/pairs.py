"""Read shards of pairs, of this package or the published ones, as one data set whose pairs are read by offset."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2f_fast.data.pair_shards import Moments, Pair, Shard, read_shard
from d2f_fast.errors import DatasetError, printable
from d2f_fast.files.atomic import StrPath

# Pairs of the first shard whose noise and latents are looked at.
CHECKED_PAIRS = 64
MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


class PairDataset:
    """Read pairs of noise and latents with their prompts.

    The index of all shards is read at the start, 32 bytes for each pair; a pair itself only when it is asked for. The
    pairs are in the order of the shards and of the pairs in them. Any thread may read.

    Args:
        sources: Folders, whose files *.tar are taken in the order of their names; tar files; or tar files with a range
            of numbers, such as "shards/{000000..000009}.tar".
        of_another_model: Whether pairs are accepted that another model made than the one that is trained.

    Attributes:
        of_another_model: The same.
        shards: The shards.
        shape: Shape of all latents and noise, [C, h, w].
        latents_deviation: Standard deviation of the latents of the first pairs.

    Raises:
        DatasetError: A source holds no shard, a shard is named twice, cannot be used (see `read_shard`) or has another
            size than the first one, or the noise of the first pairs is not from N(0, 1).
    """

    def __init__(self, sources: Sequence[StrPath], *, of_another_model: bool = False) -> None:
        self.of_another_model = of_another_model
        self.shards: list[Shard] = []
        for path in shard_paths(sources):
            shard = read_shard(path)
            if self.shards and shard.shape != self.shards[0].shape:
                raise DatasetError(
                    f"{printable(path)} has latents of {list(shard.shape)}, and {printable(self.shards[0].path)} of"
                    f" {list(self.shards[0].shape)}: train on pairs of one size at a time"
                )
            self.shards.append(shard)
        self.shape = self.shards[0].shape
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self.latents_deviation = self._check_first_pairs()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        shard, position = self._locate(index)
        return shard.read(position)

    def prompt(self, index: int) -> str:
        """Return the prompt of a pair, without reading its latents."""
        shard, position = self._locate(index)
        return shard.prompt(position)

    def common_meta(self, key: str) -> Any:
        """Return an entry of meta.json on which the first pairs of all shards agree; None where they do not."""
        values = [shard.meta.get(key) for shard in self.shards]
        return values[0] if all(value == values[0] for value in values) else None

    def _locate(self, index: int) -> tuple[Shard, int]:
        """Return the shard of a pair, and the number of the pair in it.

        Raises:
            IndexError: There is no such pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} pairs, and pair {index} was asked for")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        return shard, index - int(self._ends[number]) + len(shard)

    def _check_first_pairs(self) -> float:
        """Refuse noise that is not normal, and return the standard deviation of the latents."""
        noise, latents = Moments(), Moments()
        for index in range(min(CHECKED_PAIRS, len(self.shards[0]))):
            pair = self[index]
            noise.add(pair.noise)
            latents.add(pair.latents)
        if (difference := noise.difference_from_normal()) is not None:
            raise DatasetError(
                f"{printable(self.shards[0].path)}: the noise is not from N(0, 1), as pairs need: {difference}; divide"
                " it by what it was multiplied by, or make the pairs again"
            )
        if not np.isfinite(latents.sums).all():
            raise DatasetError(f"{printable(self.shards[0].path)}: latents hold NaN or infinity: make the pairs again")
        return latents.deviation


def shard_paths(sources: Sequence[StrPath]) -> list[Path]:
    """Return the tar files that sources name.

    Args:
        sources: Folders, tar files, and tar files with ranges of numbers; see `PairDataset`.

    Raises:
        DatasetError: A folder holds no tar, a file does not exist, a range is reversed or too long, a file is named
            twice, or there is no source.
    """
    paths: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
            if found := [file for file in found if not file.name.startswith(".")]:
                paths += found
                continue
            raise DatasetError(f"{printable(path)} holds no shards *.tar: give the folder that d2f pairs wrote")
        paths += [path] if path.exists() else _expanded(str(source))
    if not paths:
        raise DatasetError("pairs: give a folder of shards, or tar files")
    seen: set[Path] = set()
    for path in paths:
        if not path.is_file():
            raise DatasetError(f"{printable(path)}: there is no such shard; check the path, or the range of numbers")
        if (resolved := path.resolve()) in seen:
            raise DatasetError(f"{printable(path)} is named twice: name each shard once")
        seen.add(resolved)
    return paths


def _expanded(source: str) -> list[Path]:
    """Return the paths of a name with ranges such as {000..219}, whose zeros in front give the width."""
    parts = _RANGE.split(source)
    choices: list[list[str]] = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if not 1 <= len(numbers) <= MAX_SHARDS:
            raise DatasetError(
                f"{printable(source)}: the range {first}..{last} has no numbers, or too many: correct it"
            )
        width = len(first) if first.startswith("0") else 0
        choices.append([f"{number:0{width}d}" for number in numbers])
    names = itertools.product(*choices)
    return [
        Path(parts[0] + "".join(number + text for number, text in zip(chosen, parts[3::3], strict=True)))
        for chosen in itertools.islice(names, MAX_SHARDS)
    ]
