"""LoRA dispatch: choose a LoRA linear's path and blocks from a committed table, on the host, from shapes alone.

    "split"   s = x Aᵀ, then y = x Wᵀ + s (scale B)ᵀ + bias in one accumulator and one store      Triton kernels
    "addmm"   y = x Wᵀ + bias, then y += s (scale B)ᵀ                                             plain torch, cuBLAS

`benchmarks/tune_lora.py` measures a card and writes `lora_measured.json` beside this file; its entries replace those
below. Entries that were not measured follow a byte and FLOP model. Fusing the adapter's own traffic pays where the base
product is bound by memory, that is where N K / (N + K) is small: one of N and K is 320, or one is 640 and the other is
not much larger. Wider products are bound by arithmetic, and there a Triton product that is slower than cuBLAS's loses
more than fusion saves. The blocks are those that compile without spills into each card's shared memory; a test compiles
every one. Unknown cards, unknown shapes and small batches take "addmm".
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

ComputePath = Literal["split", "addmm"]

PATH_VARIABLE = "D2F_FAST_LORA_PATH"  # environment variable that forces a path, for tests and benchmarks
MEASURED = Path(__file__).with_name("lora_measured.json")
MIN_ROWS = 4096  # with fewer rows, launches cost more than traffic, and the programs are too few to fill a card
MAX_RANK = 128
RANK_BUCKETS = (16, 32, 64, 128)
CAPABILITIES = (80, 86, 89, 90, 120)

# Pairs (N, K) of output and input features in Stable Diffusion 1.5, 2.1 and XL; q, k, v packed into one have 3 N.
SPLIT_SHAPES = (
    *((320, 320), (960, 320), (2560, 320), (320, 1280), (640, 640), (1920, 640)),
    *((320, 640), (640, 320), (320, 960), (640, 960)),  # 1x1 convolutions beside a ResNet block
)
ADDMM_SHAPES = (
    *((5120, 640), (640, 2560), (1280, 1280), (3840, 1280), (10240, 1280), (1280, 5120)),
    *((640, 1280), (640, 1920), (1280, 640), (1280, 1920), (1280, 2560)),  # 1x1 convolutions
    *((n, k) for n in (320, 640, 1280) for k in (768, 1024, 2048)),  # text keys and values
)


class Tile(NamedTuple):
    """Block sizes of a product: m rows, n output features, k summed features; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Entry(NamedTuple):
    """Path and blocks of products of one (capability, N, K, rank bucket)."""

    path: ComputePath
    forward: Tile  # for y = x Wᵀ + s (scale B)ᵀ
    grad_x: Tile  # for dx = dy W + ds A


class NarrowEntry(NamedTuple):
    """Blocks of products with the rank on one side, of one (capability, rank bucket); the features hardly matter."""

    shrink: Tile  # for s = x Aᵀ and ds = dy (scale B)
    rows_sum: Tile  # for dA = dsᵀ x and dB = dyᵀ s: m rows at a time, n features
    grad_b: Tile | None  # for ds and dB in one pass over dy; None where its parts cost more than a second pass


def _entry(capability: int, n: int, k: int) -> Entry:
    by_64 = Tile(128, 64, 64, 4, 3) if capability == 90 else Tile(128, 64, 32, 4, 4)
    by_128 = Tile(128, 128, 64, 8, 3)
    path: ComputePath = "split" if (n, k) in SPLIT_SHAPES else "addmm"
    return Entry(path, forward=by_64 if n % 128 else by_128, grad_x=by_64 if k % 128 else by_128)


def _narrow_entry(capability: int, rank: int) -> NarrowEntry:
    # A block of 256 rows writes and reads back 8 * N * rank bytes of parts; reading dy again costs 512 * N bytes.
    if capability == 90:
        grad_b = Tile(256, 64, 64, 8, 2) if rank <= 64 else None
        return NarrowEntry(Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), grad_b)
    # Blocks that fit with one version of Triton spill with another: 3.9 gives fewer registers to dB on sm_120, and to s
    # and ds on sm_80 where the rank is 64 or more.
    on_80 = Tile(64, 64, 32, 8 if rank == 128 else 4, 4)
    shrink = on_80 if capability == 80 else Tile(64, 64, 64, 4, 3)
    grad_b = Tile(256, 32 if capability == 120 else 64, 64, 8, 2) if rank <= 32 else None
    return NarrowEntry(shrink, Tile(64, 64, 64, 8 if capability == 120 else 4, 3), grad_b)


TABLE: dict[tuple[int, int, int, int], Entry] = {
    (capability, n, k, rank): _entry(capability, n, k)
    for capability in CAPABILITIES
    for n, k in SPLIT_SHAPES + ADDMM_SHAPES
    for rank in RANK_BUCKETS
}
NARROW_TABLE: dict[tuple[int, int], NarrowEntry] = {
    (capability, rank): _narrow_entry(capability, rank) for capability in CAPABILITIES for rank in RANK_BUCKETS
}

Measured = tuple[dict[tuple[int, int, int, int], Entry], dict[tuple[int, int], NarrowEntry]]


def read_measured(path: Path) -> Measured:
    """Return the entries of a file that `benchmarks/tune_lora.py` wrote, by the keys of TABLE and of NARROW_TABLE.

    Args:
        path: JSON file, {capability: {"wide": [{"n", "k", "rank", "path", "forward", "grad_x"}, …], "narrow": [{"rank",
            "shrink", "rows_sum", "grad_b"}, …]}}; its other keys say how it was measured. A missing file has no
            entries.

    Raises:
        ValueError: the file has another structure, or no kernel could run one of its entries; the message names it.
    """
    wide: dict[tuple[int, int, int, int], Entry] = {}
    narrow: dict[tuple[int, int], NarrowEntry] = {}
    if not path.exists():
        return wide, narrow
    where = str(path)
    try:
        for capability, card in json.loads(path.read_bytes()).items():
            for row in card["wide"]:
                where = f"{path}: sm_{capability}, {row}"
                key = (int(capability), _number(row, "n"), _number(row, "k"), _number(row, "rank"))
                if row["path"] not in get_args(ComputePath) or key[1] % 16 or key[2] % 16 or key[3] not in RANK_BUCKETS:
                    raise ValueError(f"path must be split or addmm, n, k multiples of 16, rank one of {RANK_BUCKETS}")
                wide[key] = Entry(row["path"], _tile(row, "forward"), _tile(row, "grad_x"))
            for row in card["narrow"]:
                where = f"{path}: sm_{capability}, {row}"
                if _number(row, "rank") not in RANK_BUCKETS:
                    raise ValueError(f"rank must be one of {RANK_BUCKETS}")
                grad_b = None if row["grad_b"] is None else _tile(row, "grad_b")
                narrow[int(capability), row["rank"]] = NarrowEntry(_tile(row, "shrink"), _tile(row, "rows_sum"), grad_b)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where} is not an entry of the LoRA kernels ({error}): write the file again with benchmarks/tune_lora.py,"
            " or remove it"
        ) from error
    return wide, narrow


def _number(row: Mapping[str, object], name: str) -> int:
    value = row[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _tile(row: Mapping[str, Iterable[int]], name: str) -> Tile:
    tile = Tile(*row[name])
    sizes = (tile.m, tile.n, tile.k, tile.warps)
    if any(type(size) is not int or size < 1 or size & (size - 1) for size in sizes) or min(sizes[:3]) < 16:
        raise ValueError(f"{name} must be [m, n, k, warps, stages], powers of two, m, n, k >= 16, got {row[name]}")
    if type(tile.stages) is not int or not 1 <= tile.stages <= 8 or tile.warps > 16:
        raise ValueError(f"{name} must have at most 16 warps and 1 to 8 stages, got {row[name]}")
    return tile


_wide, _narrow = read_measured(MEASURED)
TABLE |= _wide
NARROW_TABLE |= _narrow

# These blocks fit everywhere: for float32, and where "split" is forced on an unknown shape or card.
_SMALL = Tile(64, 64, 32, 4, 2)
ANY_ENTRY, ANY_NARROW_ENTRY = Entry("addmm", _SMALL, _SMALL), NarrowEntry(_SMALL, _SMALL, None)


def choose_path(rows: int, n: int, k: int, rank: int, dtype: torch.dtype, device: torch.device) -> ComputePath:
    """Return the path of one LoRA linear; torch.compile can trace it, and guards on the rows.

    Args:
        rows: number of rows of x, the product of its leading dimensions.
        n, k: numbers of output and input features.
        rank: rank of the adapter, or the sum of the ranks of several adapters.
        dtype: type of the product.
        device: device of x.

    Raises:
        ValueError: the environment variable D2F_FAST_LORA_PATH is set to something else than a path.
    """
    forced: ComputePath | None = _forced_path()
    if n % 16 or k % 16 or not 0 < rank <= MAX_RANK or dtype == torch.float64:
        return "addmm"  # no kernel serves these
    if forced is not None:
        return forced
    entry = TABLE.get((_capability(device.type, device.index), n, k, rank_bucket(rank)))
    if entry is None or entry.path == "addmm" or dtype == torch.float32 or rows < MIN_ROWS:
        return "addmm"
    return "split"


def runs_plain(device: torch.device) -> bool:
    """Return whether a LoRA layer should run plain torch on this device: it is not a GPU, and no path is forced."""
    return device.type != "cuda" and _forced_path() is None


def entry_of(n: int, k: int, rank: int, dtype: torch.dtype, device: torch.device) -> Entry:
    """Return the blocks of the products that are `n` or `k` features wide."""
    if dtype == torch.float32:
        return ANY_ENTRY
    return TABLE.get((_capability(device.type, device.index), n, k, rank_bucket(rank)), ANY_ENTRY)


def narrow_entry_of(rank: int, dtype: torch.dtype, device: torch.device) -> NarrowEntry:
    """Return the blocks of the products that are `rank` wide."""
    if dtype == torch.float32:
        return ANY_NARROW_ENTRY
    return NARROW_TABLE.get((_capability(device.type, device.index), rank_bucket(rank)), ANY_NARROW_ENTRY)


def rank_bucket(rank: int) -> int:
    """Return the rank that the kernels compute with: the smallest of RANK_BUCKETS that holds `rank`."""
    return next(bucket for bucket in RANK_BUCKETS if rank <= bucket)


# Both functions run while torch.compile traces, and their results are constants of the compiled code.
@torch.compiler.assume_constant_result
def _forced_path() -> ComputePath | None:
    forced = os.environ.get(PATH_VARIABLE)
    if forced is not None and forced not in get_args(ComputePath):
        raise ValueError(f"{PATH_VARIABLE} must be one of {get_args(ComputePath)}, got {forced!r}")
    return forced  # type: ignore[return-value]


@torch.compiler.assume_constant_result
def _capability(device_type: str, index: int | None) -> int:
    """Return the compute capability of a device, 90 for sm_90, or 0 where it is not an NVIDIA GPU."""
    if device_type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
