"""Read shards of pairs, of this package or the published ones, as one data set whose pairs are read by offset."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2f_fast.data.file_names import PAIRS_FILE
from d2f_fast.data.moments import Moments
from d2f_fast.data.pair_shards import Pair, Shard, not_finite, read_shard
from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.files.atomic import StrPath
from d2f_fast.files.json_file import read_json

# Pairs of the first shard, and of each other one, whose noise and latents are looked at.
CHECKED_PAIRS, CHECKED_LATER = 64, 4
MAX_SHARDS = 1_000_000
_OTHER_TAR = re.compile(r"\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


class PairDataset:
    """Read pairs of noise and latents with their prompts.

    The index of all shards is read at the start, 32 bytes for each pair; a pair itself only when it is asked for. The
    pairs are in the order of the shards and of the pairs in them. Any thread may read.

    Args:
        sources: Folders, whose files *.tar (or *.TAR) are taken in the order of their names; tar files; or tar files
            with a range of numbers, such as "shards/{000000..000009}.tar".
        of_another_model: Whether pairs are accepted that another model made than the one that is trained.

    Attributes:
        of_another_model: The same.
        shards: The shards.
        shape: Shape of all latents and noise, [C, h, w].
        latents_deviations: Standard deviation of the latents of each shard, from up to 64 pairs of the first one and
            4 of each other one, which lie evenly in the shard.
        fingerprint: SHA-256 over the number and the first pair of each shard in their order, in hexadecimal.
        doubts: Sentences about files in the folders that are not read, and about pairs that are still to be made.

    Raises:
        DatasetError: A source holds no shard, a shard is there twice, cannot be used (see `read_shard`) or has another
            size than the first one, the noise of these pairs is not from N(0, 1), or one of them is not finite.
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
        self.latents_deviations = [
            _check_some_pairs(shard, CHECKED_LATER if number else CHECKED_PAIRS)
            for number, shard in enumerate(self.shards)
        ]
        self.fingerprint = self._fingerprint()
        self.doubts = [sentence for source in sources for sentence in _doubts(Path(source), self.shards)]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        shard, position = self._locate(index)
        return shard.read(position)

    def prompt(self, index: int) -> str:
        """Return the prompt of a pair, without reading its latents."""
        shard, position = self._locate(index)
        return shard.prompt(position)

    def place(self, index: int) -> str:
        """Return the file and the key of a pair, for messages: the headers of its shard are read again."""
        shard, position = self._locate(index)
        return f"{printable(shard.path)}: pair {printable(shard.key(position))}"

    def settings(self) -> dict[str, str | float]:
        """Return what a continuation of a run must match of its pairs."""
        return {"pairs": self.fingerprint[:16]}

    def common_meta(self, key: str) -> Any:
        """Return an entry of meta.json on which all shards and their pairs agree; None where they do not."""
        values = [kind.get(key) for shard in self.shards for kind in shard.kinds or ({},)]
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

    def _fingerprint(self) -> str:
        """Return the hash of the shards, or refuse two that hold the same pairs."""
        digest, seen = hashlib.sha256(), dict[bytes, Path]()
        for shard in self.shards:
            first = shard.read(0)
            own = hashlib.sha256(f"{len(shard)} {first.prompt}".encode("utf-8", "surrogateescape"))
            own.update(first.latents.tobytes() + first.noise.tobytes())
            if (other := seen.setdefault(own.digest(), shard.path)) != shard.path:
                raise DatasetError(
                    f"{printable(shard.path)} and {printable(other)} hold the same pairs: keep one of the two"
                )
            digest.update(own.digest())
        return digest.hexdigest()


def _check_some_pairs(shard: Shard, most: int) -> float:
    """Refuse noise that is not normal in some pairs of a shard, and return the standard deviation of their latents."""
    noise, latents = Moments(), Moments()
    for position in np.unique(np.linspace(0, len(shard) - 1, min(most, len(shard))).astype(int)).tolist():
        pair = shard.read(position)
        if (name := not_finite(pair)) is not None:
            raise DatasetError(
                f"{printable(shard.path)}: {name} of pair {printable(shard.key(position))} holds NaN or infinity:"
                " make the pairs again"
            )
        noise.add(pair.noise)
        latents.add(pair.latents)
    if (difference := noise.difference_from_normal()) is not None:
        raise DatasetError(
            f"{printable(shard.path)}: the noise is not from N(0, 1), as pairs need: {difference}; divide it by what it"
            " was multiplied by, or make the pairs again"
        )
    return latents.deviation


def _doubts(folder: Path, shards: Sequence[Shard]) -> Iterator[str]:
    """Yield sentences about a folder: files that are not read, and pairs that its pairs.json names and it lacks."""
    if not folder.is_dir():
        return
    near = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    other = [path for path in near if _OTHER_TAR.search(path.name) and not path.name.startswith(".")]
    if other := sorted(path for path in other if path.parent != folder or not _is_shard(path)):
        named = f" and {len(other) - 1} more are" if len(other) > 1 else " is"
        yield f"{printable(other[0])}{named} not read: only uncompressed files *.tar in the folder itself are"
    try:
        record = read_json(folder / PAIRS_FILE)
    except RefusedInputError:
        return  # Pairs of other programs have no such file.
    found = sum(len(shard) for shard in shards if shard.path.parent == folder)
    if isinstance(record, dict) and "num_pairs" in record and found != (planned := record["num_pairs"]):
        yield (
            f"{printable(folder)} holds {found} pairs, and its {PAIRS_FILE} names {printable(str(planned)[:20])}: the"
            " same d2f pairs command makes those that are missing"
        )


def _is_shard(path: Path) -> bool:
    """Return whether a file in a folder of shards is taken for one by its name."""
    return path.suffix.lower() == ".tar" and not path.name.startswith(".")


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
            if found := sorted(filter(_is_shard, path.iterdir())):
                paths += found
                continue
            raise DatasetError(f"{printable(path)} holds no shards *.tar: give the folder that d2f pairs wrote")
        paths += [path] if path.exists() else _expanded(str(source))
    if not paths:
        raise DatasetError("pairs: give a folder of shards, or tar files")
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise DatasetError(
                f"{printable(path)}: there is no such folder or shard; check the path, or the range of numbers"
            )
        if not path.is_file():
            raise DatasetError(f"{printable(path)} is not an ordinary file: move it away, or name the shards")
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
