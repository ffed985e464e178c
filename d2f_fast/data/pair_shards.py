"""Write, check and read one shard of pairs: the noise that a model started from, and the latents that it made of it.

    000003.tar    {key}.image_latent.npy    [C, h, w] float, latents in the scale of the pipeline (times scaling_factor)
                  {key}.noise.npy           [C, h, w] float, from N(0, 1)
                  {key}.prompt.txt          UTF-8
                  {key}.image.jpg           on request
                  {key}.meta.json           how the pair was made; not in the published shards

The keys are those of the published reflow shards of Diff2Flow. A shard appears under its name when it is whole, checked
and on the disk, and its bytes depend on the pairs alone. It is read by offset, so that no member is held in memory.
"""

import functools
import io
import json
import math
import tarfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2f_fast.data.moments import Array, Moments
from d2f_fast.errors import DatasetError, printable
from d2f_fast.files.atomic import atomic_path
from d2f_fast.files.tar_index import BLOCK, TarMember, opened, padded, read_at, tar_members

LATENTS, NOISE, PROMPT, IMAGE, META = "image_latent.npy", "noise.npy", "prompt.txt", "image.jpg", "meta.json"
REQUIRED = (LATENTS, NOISE, PROMPT)
MAX_PROMPT_BYTES = 40_000  # 10,000 characters, as for captions
_MAX_META_BYTES = 1 << 16
# Entries of meta.json that say how pairs were made, and that other pairs of the same kind have, too.
_OF_ALL_PAIRS = "model", "vae", "text_encoders", "lora", "guidance_scale_range", "steps", "solver", "height", "width"
_MAGIC_1_0 = np.lib.format.magic(1, 0)


class PairRecord(NamedTuple):
    """One pair as it is written.

    Attributes:
        key: Name of the pair, without a dot.
        latents: [C, h, w] float16 or float32; latents in the scale of the pipeline.
        noise: [C, h, w], in the same type; the noise that they were made of.
        prompt: Prompt of the pair.
        meta: How the pair was made, as JSON.
        image: The decoded image as the bytes of a JPEG file, or None for no image.
    """

    key: str
    latents: Array
    noise: Array
    prompt: str
    meta: Mapping[str, object]
    image: bytes | None = None


class Pair(NamedTuple):
    """One pair as it is read.

    Attributes:
        latents: [C, h, w] in the type of the file.
        noise: [C, h, w] in the type of the file.
        prompt: Prompt of the pair, which may be empty.
    """

    latents: Array
    noise: Array
    prompt: str


def shard_name(number: int) -> str:
    """Return the file name of a shard, such as 000003.tar."""
    return f"{number:06d}.tar"


def pair_bytes(shape: tuple[int, ...], item_bytes: int, prompt_bytes: int, image_bytes: int) -> int:
    """Return the number of bytes that one pair takes in a shard.

    Args:
        shape: Shape of its latents, [C, h, w].
        item_bytes: Size of one number: 2 for float16, and 4 for float32.
        prompt_bytes: Size of its prompt.
        image_bytes: Size of its JPEG image; 0 for none.
    """
    array = len(_npy(np.zeros((0, *shape[1:]), np.float16))) + math.prod(shape) * item_bytes
    members = [array, array, prompt_bytes, BLOCK, *([image_bytes] if image_bytes else [])]  # The meta fits a block.
    return sum(BLOCK + padded(size) for size in members)


def write_shard(path: Path, pairs: Iterable[PairRecord], count: int) -> None:
    """Write a shard, check it, bring it to the disk, and give it its name: it appears whole or not at all.

    Args:
        path: File of the shard, in a folder that exists.
        pairs: Its pairs, in order; they are made while the shard is written.
        count: Number of pairs that the shard must have.

    Raises:
        DatasetError: A number is not finite, the noise is not normal, or the file does not hold `count` whole pairs.
        RefusedInputError: The disk is full.
    """
    moments = Moments()
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for pair in pairs:
                _check_finite(pair, path)
                moments.add(pair.noise)
                for name, content in _members_of(pair):
                    # The defaults of the other entries are the same everywhere: owner 0, time 0, mode 0644.
                    member = tarfile.TarInfo(f"{pair.key}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                tar.getmembers().clear()  # It would remember every member.
        if moments.count and (difference := moments.difference_from_normal()) is not None:
            raise DatasetError(f"{printable(path)}: the noise is not from N(0, 1): {difference}; report this as a bug")
        written = len(read_shard(temporary))
        if written != count:
            raise DatasetError(f"{printable(path)}: {written} of {count} pairs were written: run again")


class Shard:
    """Read the pairs of one shard by their offsets.

    Any thread may read. No file stays open.

    Attributes:
        path: The file.
        shape: Shape of all latents and noise, [C, h, w].
        meta: Content of the first pair's meta.json; empty where it has none.
        kinds: What the meta.json of the pairs say of how they were made, each that differs from the one before;
            empty where there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape: tuple[int, ...] = ()
        self.meta: dict[str, Any] = {}
        self.kinds: list[dict[str, Any]] = []
        self._types: dict[str, np.dtype[Any]] = {}
        # One row for each pair: where its latents, its noise and its prompt begin, and the size of the prompt.
        self._rows = np.empty((0, 4), np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def index_bytes(self) -> int:
        """Return the memory that the offsets take, in bytes."""
        return self._rows.nbytes

    def read(self, index: int) -> Pair:
        """Return one pair.

        Args:
            index: Number of the pair in the shard, from 0 on.

        Raises:
            DatasetError: The file cannot be read, has been shortened, or a prompt is not UTF-8.
        """
        latents, noise, prompt, size = self._rows[index].tolist()
        with opened(self.path) as descriptor:
            arrays = [
                np.frombuffer(read_at(descriptor, self._array_bytes(name), start, self.path), self._types[name])
                for name, start in ((LATENTS, latents), (NOISE, noise))
            ]
            text = read_at(descriptor, size, prompt, self.path)
        return Pair(arrays[0].reshape(self.shape), arrays[1].reshape(self.shape), self._decoded(text, index))

    def key(self, index: int) -> str:
        """Return the key of one pair, for messages: the headers of the shard are read again.

        Args:
            index: Number of the pair in the shard, from 0 on.

        Raises:
            DatasetError: The file cannot be read, or has been changed.
        """
        start = int(self._rows[index, 2])
        return next((_key_and_kind(each.name)[0] for each in tar_members(self.path) if each.start == start), "")

    def prompt(self, index: int) -> str:
        """Return the prompt of one pair, without reading its latents.

        Args:
            index: Number of the pair in the shard, from 0 on.

        Raises:
            DatasetError: The file cannot be read, has been shortened, or the prompt is not UTF-8.
        """
        _, _, start, size = self._rows[index].tolist()
        with opened(self.path) as descriptor:
            return self._decoded(read_at(descriptor, size, start, self.path), index)

    def _array_bytes(self, name: str) -> int:
        """Return the size of an array of one kind, in bytes."""
        return math.prod(self.shape) * self._types[name].itemsize

    def _decoded(self, text: bytes, index: int) -> str:
        """Return a prompt without white space around it."""
        try:
            return text.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{printable(self.path)}: {PROMPT} of pair {printable(self.key(index))} is not UTF-8 text: make the"
                " shard again"
            ) from error


def read_shard(path: Path) -> Shard:
    """Read the index of a shard: the headers of its members, and no content.

    Args:
        path: Tar file with the keys of this module. Further members of a pair are passed over.

    Raises:
        DatasetError: The file cannot be read, is cut short or no tar, a pair lacks a key, a member has an absolute path
            or "..", or an array is not of the shape of the others.
    """
    shard = Shard(path)
    rows: list[tuple[int, int, int, int]] = []
    current, found = "", dict[str, TarMember]()
    keys, kinds = set[str](), list[dict[str, Any]]()

    def close_pair() -> None:
        if not found:
            return
        if current in keys:
            raise DatasetError(f"{printable(path)}: {printable(current)} is there twice: make the shard again")
        keys.add(current)
        if missing := [name for name in REQUIRED if name not in found]:
            raise DatasetError(
                f"{printable(path)}: {printable(current)} has no {' and no '.join(missing)} beside"
                f" {printable(next(iter(found)))}: each pair needs {', '.join(REQUIRED)} behind a key without a dot,"
                " one after the other in the tar (tar --sort=name)"
            )
        latents, noise = (_array_start(shard, found[name], name) for name in (LATENTS, NOISE))
        if (prompt := found[PROMPT]).size > MAX_PROMPT_BYTES:
            raise DatasetError(
                f"{printable(path)}: {printable(prompt.name)} has {prompt.size} bytes, more than {MAX_PROMPT_BYTES}:"
                " shorten it"
            )
        if META in found:
            meta = _read_meta(path, found[META])
            shard.meta = shard.meta if rows else meta
            kind = {name: meta[name] for name in _OF_ALL_PAIRS if name in meta}
            if not kinds or kind != kinds[-1]:  # Most shards have one kind.
                kinds.append(kind)
        rows.append((latents, noise, prompt.start, prompt.size))

    for member in tar_members(path):
        key, kind = _key_and_kind(member.name)
        if key.rpartition("/")[2] == "":
            continue  # A hidden file, as macOS adds them.
        if key != current:
            close_pair()
            current, found = key, {}
        if kind in found:
            raise DatasetError(f"{printable(path)}: {printable(member.name)} is there twice: make the shard again")
        found[kind] = member
    close_pair()
    if not rows:
        raise DatasetError(f"{printable(path)} holds no pairs: each pair needs {', '.join(REQUIRED)}")
    shard._rows, shard.kinds = np.array(rows, np.int64), kinds
    return shard


def _key_and_kind(name: str) -> tuple[str, str]:
    """Return the key of the pair to which a member of a tar belongs, and what the member is of the pair."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, kind


def _members_of(pair: PairRecord) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each member of a pair."""
    yield LATENTS, _npy(pair.latents)
    yield NOISE, _npy(pair.noise)
    yield PROMPT, pair.prompt.encode()
    if pair.image is not None:
        yield IMAGE, pair.image
    yield META, (json.dumps(pair.meta, ensure_ascii=False, allow_nan=False) + "\n").encode()


def not_finite(pair: PairRecord | Pair) -> str | None:
    """Return the name of the member of a pair that holds NaN or an infinity; None where neither does.

    Args:
        pair: Pair to be written, or as it was read.
    """
    arrays = ((LATENTS, pair.latents), (NOISE, pair.noise))
    return next((name for name, array in arrays if not np.isfinite(array).all()), None)


def _check_finite(pair: PairRecord, path: Path) -> None:
    """Refuse a pair with NaN or an infinity."""
    if (name := not_finite(pair)) is not None:
        raise DatasetError(
            f"{printable(path)}: {name} of pair {pair.key} holds NaN or infinity: run the model in float32"
            " (--mixed_precision no), and keep larger numbers (--dtype float32); if both are given, look at images"
            " of the model with d2f sample"
        )


def _npy(array: Array) -> bytes:
    """Return an array as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _array_start(shard: Shard, member: TarMember, name: str) -> int:
    """Return where the numbers of an array begin, and check that it has the shape and type of the others."""
    where = f"{printable(shard.path)}: {printable(member.name)}"
    try:
        shape, fortran, dtype, size = _npy_header(member.head)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise DatasetError(
            f"{where} is not an array of numpy in a .npy file of version 1.0: store it with numpy.save"
        ) from error
    if dtype not in (np.float16, np.float32, np.float64) or dtype.hasobject or fortran:
        order = " in Fortran order" if fortran else ""
        raise DatasetError(f"{where} holds {dtype}{order}: store float16 or float32 in C order")
    if len(shape) != 3 or not all(0 < side < 1 << 16 for side in shape):
        raise DatasetError(f"{where} has the shape {list(shape)}: latents are [channels, height, width]")
    shard.shape = shard.shape or shape
    if shape != shard.shape:
        raise DatasetError(
            f"{where} has the shape {list(shape)}, and those before it {list(shard.shape)}: keep pairs of one size in a"
            " folder"
        )
    if dtype != shard._types.setdefault(name, dtype):
        raise DatasetError(f"{where} holds {dtype}, and those before it {shard._types[name]}: make the shard again")
    if member.size != size + math.prod(shape) * dtype.itemsize:
        raise DatasetError(f"{where} does not have the size that it states: download or make the shard again")
    return member.start + size


def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, order, type and header size of a .npy file from its first bytes."""
    if head[:8] != _MAGIC_1_0:
        raise ValueError("it is not a .npy file of version 1.0")
    return _parsed_npy_header(head[: 10 + int.from_bytes(head[8:10], "little")])


@functools.lru_cache(maxsize=64)  # The arrays of a shard have equal headers, whose parsing takes most of the time.
def _parsed_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, order, type and size of the header of a .npy file."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    with warnings.catch_warnings(action="ignore"):  # about files of Python 2, which are read all the same
        return *np.lib.format.read_array_header_1_0(stream), len(header)


def _read_meta(path: Path, member: TarMember) -> dict[str, Any]:
    """Return the content of a meta.json."""
    if member.size > _MAX_META_BYTES:
        raise DatasetError(
            f"{printable(path)}: {printable(member.name)} has {member.size} bytes, more than {_MAX_META_BYTES}: shorten"
            " it"
        )
    content = member.head[: member.size]
    if member.size > len(content):
        with opened(path) as descriptor:
            content = read_at(descriptor, member.size, member.start, path)
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{printable(path)}: {printable(member.name)} is not JSON: make the shard again") from error
    if not isinstance(meta, dict):
        raise DatasetError(f"{printable(path)}: {printable(member.name)} is not a JSON object: make the shard again")
    return meta
