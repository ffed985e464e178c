"""Measure a GPU, and write the entries of the LoRA kernels' dispatch table for it.

    python -m benchmarks.tune_lora --minutes 30
    python -m benchmarks.tune_lora --minutes 2 --shapes steps         # what steps at rank 16 need, on attention first

For each width and rank, the blocks of the kernels are timed one by one; then forward and backward by the best blocks
and by cuBLAS ("addmm"), at the rows of a batch of 16 images and at the fewest rows that the table covers. The kernels
are chosen where they win at the former and do not lose at the latter. Every block is compared with float64 first.

`kernels/lora_measured.json` is written after each entry. Entries that it already has are not measured again, so that
the next run continues one that was stopped. Each timing is a row of `<results>/<device>-lora-tuning.csv`.

Compiling the kernels one after the other would take half an hour: `compile_ahead` does it in other processes. A machine
without a GPU can do it, too, and take the cache along to one of the same Python and Triton:

    TRITON_CACHE_DIR=cache python -m benchmarks.tune_lora --shapes steps --compile_for 90
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks import clock
from benchmarks.compile_ahead import Ahead, Launch, free_cores, narrow_launches, wide_launches
from benchmarks.lora_paths import ADDMM, Operands, Ops, errors_of, operands, run_step, split
from d2f_fast.files.json_file import write_json
from d2f_fast.kernels import lora_dispatch
from d2f_fast.kernels.lora_dispatch import MEASURED, MIN_ROWS, Entry, NarrowEntry, Tile
from d2f_fast.kernels.lora_kernels import _dividing

try:
    from triton.runtime.errors import OutOfResources
except ImportError:
    OutOfResources = RuntimeError

WINS, LOSES = 0.98, 1.02  # largest time of the kernels over that of addmm, at many rows and at few
ROUNDS = 7
ROWS = {320: 65536, 640: 16384, 1280: 4096}  # of a batch of 16, by the fewer of a layer's features
LEAST_ROWS = {"cuda": MIN_ROWS, "cpu": 32}  # the fewest that the table covers; a dry run on a CPU is as small as that
Shapes: TypeAlias = Sequence[tuple[int, int]]  # pairs of output and input features
# q, k and v packed at rank 16 have rank 48, which uses the entry of rank 64.
RANKS = (16, 64, 32, 128)
# Features out and in, ordered by their part in the time of a step of Stable Diffusion 1.5.
SHAPES = (
    *((320, 320), (960, 320), (320, 1280), (2560, 320), (640, 640), (1920, 640), (5120, 640), (640, 2560)),
    *((1280, 1280), (3840, 1280), (10240, 1280), (1280, 5120)),
    *(
        (320, 640),
        (320, 960),
        (640, 320),
        (640, 960),
        (640, 1280),
        (640, 1920),
        (1280, 640),
        (1280, 1920),
        (1280, 2560),
    ),
)
NARROW_SHAPES = ((320, 320), (640, 640))  # at which the blocks are chosen that hardly depend on the features
# Features out and in, by rank, of the layers of Stable Diffusion 1.5 and XL with adapters of rank 16: attention, whose
# q, k and v are packed, and then the feed-forward.
OF_STEPS: tuple[dict[int, Shapes], ...] = (
    {16: ((320, 320), (640, 640), (1280, 1280)), 64: ((960, 320), (1920, 640), (3840, 1280))},
    {16: ((2560, 320), (320, 1280), (5120, 640), (640, 2560), (10240, 1280), (1280, 5120))},
)
WIDE = tuple(
    Tile(*sizes)
    for sizes in (
        *((128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4), (128, 128, 32, 8, 4), (128, 64, 64, 4, 4)),
        *((64, 64, 64, 4, 4), (128, 128, 64, 8, 4), (256, 64, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3)),
    )
)
SHRINK = tuple(
    Tile(*sizes)
    for sizes in ((64, 64, 64, 4, 4), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 4), (64, 64, 64, 4, 2))
)
ROWS_SUM = tuple(
    Tile(*sizes)
    for sizes in (
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (64, 64, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 8, 2),
    )
)
GRAD_B = tuple(
    Tile(*sizes) for sizes in ((256, 64, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 4, 2), (256, 32, 64, 8, 2))
)


class Tuner:
    """Time blocks and whole layers on one device.

    Args:
        device: device to measure.
        dtype: type of the products.
        rounds: rounds of each timing.
        deadline: time of `time.monotonic` after which nothing is started.
        results: folder of the rows.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int, deadline: float, results: Path) -> None:
        self.device, self.dtype, self.rounds = device, dtype, rounds
        self.deadline, self.results = deadline, results

    def rows_of(self, n: int, k: int) -> list[int]:
        """Return the numbers of rows at which a layer is timed: those of a batch of 16, and the fewest of the table."""
        least = LEAST_ROWS[self.device.type]
        return list(dict.fromkeys((ROWS.get(min(n, k), 2 * least), least)))

    def narrow_entry(self, rank: int, sizes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """Choose the blocks of the products that are `rank` wide, by their total time over `sizes` (rows, n, k)."""
        wide = Entry("split", WIDE[0], WIDE[0])
        chosen, times = NarrowEntry(SHRINK[0], ROWS_SUM[0], None), {}
        calls: dict[str, tuple[Sequence[Tile | None], Callable[[Ops, Operands], Any]]] = {
            "shrink": (SHRINK, lambda ops, o: ops.shrink(o.x, o.a)),
            "rows_sum": (ROWS_SUM, lambda ops, o: ops.da(o.grad_s, o.x)),
            "grad_b": ((None, *GRAD_B), lambda ops, o: ops.ds_db(o.grad_y, o.s, o.b)),
        }
        for name, (tiles, call) in calls.items():
            found: dict[Tile | None, float] = {}
            for tile in tiles:
                ops, total = split(wide, chosen._replace(**{name: tile})), 0.0
                for rows, n, k in sizes:
                    given, took = (rows, n, k, rank), None
                    if self.is_right(ops, n, k, rank):
                        took = self.microseconds(lambda *o, ops=ops, call=call: call(ops, Operands(*o)), given)
                    self.row(name, given, tile, took)
                    total += math.inf if took is None else took
                found[tile] = total
            best = min(found, key=lambda tile, found=found: found[tile])
            chosen, times[name] = chosen._replace(**{name: best}), round(found[best], 2)
        return {"rank": rank, **chosen._asdict(), "microseconds": times}

    def wide_entry(
        self, rows: Sequence[int], n: int, k: int, rank: int, narrow: NarrowEntry, tiles: Sequence[Tile]
    ) -> dict[str, Any]:
        """Choose between the kernels and addmm for a layer, and the blocks of its wide products.

        Blocks are chosen at the first of `rows`; the kernels must win there and not lose at the others.
        """
        given = (rows[0], n, k, rank)
        found: dict[str, dict[Tile, float]] = {"forward": {}, "grad_x": {}}
        for tile in tiles:
            ops = split(Entry("split", tile, tile), narrow)
            if not self.is_right(ops, n, k, rank):
                self.row("wide", given, tile, None)
                continue
            calls: dict[str, Callable[..., Any]] = {
                "forward": lambda *o, ops=ops: ops.forward(o[0], o[2], o[3], o[6], o[5]),
                "grad_x": lambda *o, ops=ops: ops.dx(o[1], o[2], o[7], o[4]),
            }
            for name, call in calls.items():
                took = self.microseconds(call, given)
                self.row(name, given, tile, took)
                if took is not None:
                    found[name][tile] = took
        chosen = {name: min(times, key=lambda t: times[t]) if times else tiles[0] for name, times in found.items()}
        ops = split(Entry("split", **chosen), narrow)
        times, path = {}, "split" if all(found.values()) else "addmm"
        for count in rows if path == "split" else ():
            given = (count, n, k, rank)
            addmm = self.microseconds(lambda *o: run_step(ADDMM, Operands(*o)), given)
            kernels = self.microseconds(lambda *o: run_step(ops, Operands(*o)), given)
            self.row("addmm step", given, None, addmm)
            self.row("split step", given, None, kernels)
            if addmm is None or kernels is None or kernels > (WINS if count == rows[0] else LOSES) * addmm:
                path = "addmm"
            times[str(count)] = {"split": kernels, "addmm": addmm}
        return {"n": n, "k": k, "rank": rank, "path": path, **chosen, "microseconds": times}

    def is_right(self, ops: Ops, n: int, k: int, rank: int) -> bool:
        """Return whether the operations run on this card; a block may be too large for it.

        Raises:
            RuntimeError: the operations are further from float64 than cuBLAS.
        """
        # The rows fill no block, but are a multiple of 16 like the timed ones, or Triton would compile another kernel.
        o = operands(MIN_ROWS + 48 if self.device.type == "cuda" else 48, n, k, rank, self.device, self.dtype)
        try:
            errors = errors_of(ops, o)
        except OutOfResources:
            return False
        allowed = [1.2 * error + 1e-6 for error in errors_of(ADDMM, o)]
        if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
            raise RuntimeError(f"{n} x {k}, rank {rank}: {errors} from float64, {allowed} allowed: a wrong kernel")
        return True

    def microseconds(self, call: Callable[..., Any], given: tuple[int, int, int, int]) -> float | None:
        """Return the rounded median of a call; None where a block is too large for the card."""
        try:
            inputs = lambda: operands(*given, self.device, self.dtype)  # noqa: E731
            return round(clock.time_calls(call, inputs, self.device, self.rounds)[0] * 1e6, 2)
        except OutOfResources:
            return None

    def row(self, op: str, given: tuple[int, int, int, int], tile: Tile | None, took: float | None) -> None:
        """Write a timing as a row."""
        sizes = dict(zip(("rows", "n", "k", "rank"), given, strict=True))
        row = {"op": op, **sizes, "tile": "x".join(map(str, tile or ())), "us": "too large" if took is None else took}
        clock.append(row, "lora-tuning", self.results)

    @property
    def late(self) -> bool:
        """Return whether the deadline has passed."""
        return time.monotonic() > self.deadline


def narrow_trials(rank: int, shapes: Shapes) -> list[Launch]:
    """Return every launch of `Tuner.narrow_entry`."""
    wide, found = Entry("split", WIDE[0], WIDE[0]), list[Launch]()
    tiles = itertools.zip_longest(SHRINK, ROWS_SUM, (None, *GRAD_B))
    for (shrink, rows_sum, grad_b), (n, k) in itertools.product(tiles, shapes):
        entry = NarrowEntry(shrink or SHRINK[0], rows_sum or ROWS_SUM[0], None)
        found += [*wide_launches(wide, n, k, rank), *narrow_launches(entry, n, k, rank)]
        found += narrow_launches(entry._replace(grad_b=grad_b), n, k, rank)
    return found


def effective(tiles: Iterable[Tile], n: int, k: int) -> list[Tile]:
    """Return the blocks that differ for a product of n features summed over k."""
    kept: dict[Tile, None] = {}
    for tile in tiles:
        kept[tile._replace(n=_dividing(tile.n, n), k=_dividing(tile.k, k))] = None
    return list(kept)


def tune(tuner: Tuner, output: Path, capability: int, shapes_of: Mapping[int, Shapes], narrow_shapes: Shapes,
         tiles: Sequence[Tile], ahead: Ahead) -> bool:  # fmt: skip
    """Measure the entries that the file lacks until the deadline, and return whether it has all.

    Args:
        tuner: timings of a device.
        output: file of the table.
        capability: compute capability of the device.
        shapes_of: layers by their rank, in order.
        narrow_shapes: layers at which the blocks of the products that are `rank` wide are chosen.
        tiles: blocks of the other products.
        ahead: processes that compile.
    """
    table: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    lora_dispatch.read_measured(output)  # this refuses a corrupt file
    card = table.setdefault(str(capability), {"measured_on": {}, "wide": [], "narrow": []})
    card["measured_on"] = clock.measured_on()
    narrow_sizes, ranks = [(tuner.rows_of(n, k)[0], n, k) for n, k in narrow_shapes], list(shapes_of)
    for rank, shapes in shapes_of.items():
        found = next((row for row in card["narrow"] if row["rank"] == rank), None)
        if found is None:
            if tuner.late:
                return False
            ahead.wait(narrow_trials(rank, narrow_shapes))
            found = tuner.narrow_entry(rank, narrow_sizes)
            card["narrow"].append(found)
            write_json(output, table)
        narrow = NarrowEntry(**{name: found[name] and Tile(*found[name]) for name in NarrowEntry._fields})
        waiting: dict[tuple[int, int], tuple[list[Tile], list[Launch]]] = {}
        for n, k in shapes:
            if any((row["n"], row["k"], row["rank"]) == (n, k, rank) for row in card["wide"]):
                continue
            # The best blocks of a width hardly depend on the rank: after the first rank, only they are tried.
            known = [Tile(*row[name]) for row in card["wide"] if (row["n"], row["k"]) == (n, k)
                     for name in ("forward", "grad_x")]  # fmt: skip
            options = effective([*known, WIDE[0], WIDE[1]] if known else tiles, n, k)
            launches = [launch for tile in options for launch in wide_launches(Entry("split", tile, tile), n, k, rank)]
            waiting[n, k] = options, narrow_launches(narrow, n, k, rank) + launches
        ahead.submit(launch for _, launches in waiting.values() for launch in launches)
        for later in ranks[ranks.index(rank) + 1 :][:1]:
            ahead.submit(narrow_trials(later, narrow_shapes))
        for (n, k), (options, launches) in waiting.items():
            if tuner.late:
                return False
            ahead.wait(launches)
            card["wide"].append(tuner.wide_entry(tuner.rows_of(n, k), n, k, rank, narrow, options))
            write_json(output, table)
    return True


def compile_for(capability: int, parts: Iterable[Mapping[int, Shapes]]) -> int:
    """Compile the kernels that a tuning launches into Triton's cache, without a GPU, and return their number."""
    from triton.backends.compiler import GPUTarget

    launches: dict[Launch, None] = {}
    for rank, shapes in itertools.chain.from_iterable(part.items() for part in parts):
        launches |= dict.fromkeys(narrow_trials(rank, NARROW_SHAPES))
        for n, k in shapes:
            launches |= dict.fromkeys(narrow_launches(lora_dispatch.NARROW_TABLE[capability, rank], n, k, rank))
            for tile in effective(WIDE, n, k):
                launches |= dict.fromkeys(wide_launches(Entry("split", tile, tile), n, k, rank))
    ahead = Ahead(free_cores(), GPUTarget("cuda", capability, 32))
    ahead.wait(launches)
    ahead.close()
    return len(launches)


def main() -> None:
    """Tune this device, and print how many entries the table has."""
    parser = clock.gpu_script(__doc__, minutes=30)
    parser.add_argument("--shapes", choices=("all", "steps"), default="all", help="layers to tune (default: all)")
    parser.add_argument(
        "--compile_for",
        type=int,
        metavar="CAPABILITY",
        help="only compile the kernels for GPUs of a compute capability, such as 90; needs no GPU",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=MEASURED,
        help="table to write or to continue (default: kernels/lora_measured.json)",
    )
    given = parser.parse_args()
    parts = OF_STEPS if given.shapes == "steps" else (dict.fromkeys(RANKS, SHAPES),)
    if given.compile_for:
        print(f"{compile_for(given.compile_for, parts)} launches")
        return
    options, cuda = clock.gpu_options(parser), torch.cuda.is_available()
    device, deadline = torch.device("cuda" if cuda else "cpu"), time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    tuner = Tuner(device, torch.bfloat16, ROUNDS, deadline, options.results)
    narrow_shapes, tiles = NARROW_SHAPES, WIDE
    if options.dry_run:
        parts, narrow_shapes, tiles = ({16: ((32, 32), (64, 32))},), ((32, 32),), WIDE[:2]
        tuner.rounds, tuner.dtype = 2, torch.float32  # Triton's interpreter truncates bfloat16
    ahead = Ahead(0)
    if cuda:
        from triton.runtime import driver

        ahead = Ahead(free_cores(), driver.active.get_current_target(), tuner.dtype)
    capability = lora_dispatch._capability(device.type, device.index)
    done = [tune(tuner, options.output, capability, part, narrow_shapes, tiles, ahead) for part in parts]
    ahead.close()
    wide, narrow = lora_dispatch.read_measured(options.output)
    chosen = sum(entry.path == "split" for entry in wide.values())
    print(f"{len(wide)} entries, {chosen} by the kernels, {len(narrow)} ranks; {'complete' if all(done) else 'go on'}")
    print(options.output)


if __name__ == "__main__":
    main()
