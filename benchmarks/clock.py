"""Time functions, measure the device's ceilings beside them, and write rows to the tables of results."""

import argparse
import csv
import functools
import itertools
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2f_fast.kernels.runtime import INTERPRET

RESULTS = Path(__file__).parent / "results"
# Whether the environment of this run names a cache of compiled code. It is read at import, because Inductor sets the
# variable later.
KEEPS_COMPILED_CODE = "TORCHINDUCTOR_CACHE_DIR" in os.environ
# Columns that are printed of each table; all columns of tables that are not listed.
SHOWN = {
    "": (
        *("benchmark", "case", "provider", "timing", "median_us", "p20_us", "p80_us"),
        *("gb_per_s", "share_of_copy", "tflop_per_s", "share_of_matmul"),
    ),
    "sampling": (
        *("case", "steps", "provider", "picture_ms", "fastest_ms", "slowest_ms", "vs_diffusers", "load_s", "file_mb"),
        *("peak_mib", "largest_difference"),
    ),
    "train-step": (
        *("case", "provider", "compile_cache", "median_ms", "p20_ms", "p80_ms", "images_per_s", "vs_script"),
        *("first_step_s", "to_step_500_s", "peak_mib", "kernels", "host_ms", "share_of_matmul", "share_of_ceiling"),
    ),
}
DRY_RUN = [False]  # whether this process runs everything at its smallest size, so that its rows measure nothing
ROUND_SECONDS = 0.01  # length of a round; the cost of timing it, some 10 µs on a GPU, stays below 0.2 %
CLOCK_SECONDS = 2.5  # length of the load under which nvidia-smi, which may take two seconds, reads the clock rate


def gpu_script(document: str | None, minutes: float) -> argparse.ArgumentParser:
    """Return a parser with the options that every script that measures a GPU has.

    Args:
        document: docstring of the script, whose first line describes it.
        minutes: default of the time limit.
    """
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder to which rows are written (default: benchmarks/results)"
    )
    minutes_help = f"start no measurement after this many minutes (default: {minutes:g})"
    parser.add_argument("--minutes", type=float, default=minutes, help=minutes_help)
    parser.add_argument(
        "--dry_run", action="store_true", help="use tiny sizes; runs in Triton's interpreter without a GPU"
    )
    return parser


def gpu_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options of a `gpu_script`; exit if there is no GPU, unless this is a dry run in the interpreter."""
    options = parser.parse_args()
    DRY_RUN[0] = options.dry_run
    if not torch.cuda.is_available() and not (options.dry_run and INTERPRET):
        parser.error("needs a CUDA GPU; with --dry_run and TRITON_INTERPRET=1 in the environment, none")
    return options


def tensors_of(operands: Iterable[Any]) -> Iterable[Tensor]:
    """Return the tensors among operands."""
    return (x for x in operands if isinstance(x, Tensor))


def make_round(
    function: Callable[..., Any], inputs: Callable[[], tuple[Any, ...]], where: torch.device, graph: bool
) -> tuple[Callable[[], None], int]:
    """Return the function that one round runs, which takes about ROUND_SECONDS, and its number of calls.

    Args:
        function: function to time.
        inputs: function that returns one tuple of operands. On a GPU it is called as often as it takes to make operands
            of twice the size of the L2 cache, which are used in turn.
        where: device of the operands.
        graph: Replay a CUDA graph of the calls instead of launching them.
    """
    operands = [inputs()]
    if where.type == "cuda":
        size = sum(x.numel() * x.element_size() for x in tensors_of(operands[0]))
        cold = 2 * torch.cuda.get_device_properties(where).L2_cache_size
        operands += [inputs() for _ in range(math.ceil(cold / max(size, 1)) - 1)]
    for _ in range(3):  # the first calls compile and fill caches
        function(*operands[0])
    if not graph:
        turns = itertools.cycle(operands)
        calls = max(1, round(ROUND_SECONDS / seconds_of(lambda: function(*next(turns)), where)))

        def target() -> None:
            for _ in range(calls):
                function(*next(turns))

        return target, calls
    side = torch.cuda.Stream(where)
    side.wait_stream(torch.cuda.current_stream(where))
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*operands[0])
    torch.cuda.current_stream(where).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for taken in operands:
            function(*taken)
    replays = max(1, round(ROUND_SECONDS / seconds_of(captured.replay, where)))

    def replay() -> None:
        for _ in range(replays):
            captured.replay()

    return replay, replays * len(operands)


def quantiles_of(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentiles."""
    tenths = statistics.quantiles(seconds, n=10)
    return statistics.median(seconds), tenths[1], tenths[7]


def time_calls(
    function: Callable[..., Any], inputs: Callable[[], tuple[Any, ...]], where: torch.device, rounds: int
) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentiles of the seconds of one call.

    On a GPU the calls are replayed from a CUDA graph, with operands that are not in the L2 cache.
    """
    target, calls = make_round(function, inputs, where, where.type == "cuda")
    target()
    return quantiles_of([seconds_of(target, where, 1) / calls for _ in range(rounds)])


def seconds_of(function: Callable[[], Any], where: torch.device, repeats: int = 9) -> float:
    """Return the median seconds of a call, including the host's work and the wait for the device."""
    seconds = []
    for _ in range(repeats):
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        started = time.perf_counter()
        function()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _seconds_of_one(function: Callable[[], Any], where: torch.device) -> float:
    """Return the seconds of a call; on a GPU ten are timed together, as a launch and a wait take 5 to 10 % of one."""
    calls = 10 if where.type == "cuda" else 1

    def several() -> None:
        for _ in range(calls):
            function()

    return seconds_of(several, where) / calls


@functools.cache
def copy_rate(where: torch.device) -> float:
    """Return the bytes per second that `copy_` reads and writes, on operands far larger than the caches."""
    source = torch.ones((1 << 28 if where.type == "cuda" else 1 << 26) // 4, device=where)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _seconds_of_one(lambda: target.copy_(source), where)


@functools.cache
def matmul_rate(where: torch.device) -> float:
    """Return the operations per second of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (1024, torch.float32)
    a = torch.randn(side, side, device=where, dtype=dtype)
    return 2 * side**3 / _seconds_of_one(lambda: a @ a, where)


@functools.cache
def clock_mhz(where: torch.device) -> str:
    """Return the clock rate of the GPU's multiprocessors under load, in MHz; "" on a CPU or without nvidia-smi."""
    if where.type != "cuda" or not shutil.which("nvidia-smi"):
        return ""
    side = 12288  # at this size the products fit into the GPU's queue of 1024 launches
    a = torch.randn(side, side, device=where, dtype=torch.bfloat16)
    for _ in range(round(CLOCK_SECONDS * matmul_rate(where) / (2 * side**3))):
        a @ a
    uuid = f"GPU-{torch.cuda.get_device_properties(where).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    clock = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    torch.cuda.synchronize(where)
    return clock


@functools.cache
def _commit() -> str:
    """Return the commit's short hash, with "-dirty" if files other than results changed; $GIT_COMMIT without git."""
    if not shutil.which("git"):
        return os.environ.get("GIT_COMMIT", "none")
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    status = [*git, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout
    return (commit or os.environ.get("GIT_COMMIT", "none")) + ("-dirty" if changed else "")


def _processor() -> str:
    """Return the name of the CPU, for which `platform.processor()` is empty on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def measured_on() -> dict[str, str]:
    """Return the device, the commit and the package versions of this run; the device says whether it is a dry run."""
    try:
        triton_version = version("triton")
    except PackageNotFoundError:
        triton_version = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "commit": _commit(),
        "device": f"dry run on {device}" if DRY_RUN[0] else device,
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": str(torch.get_num_threads()),
    }


def path_of(table: str = "", folder: Path | None = None) -> Path:
    """Return the path of this device's table.

    Args:
        table: name of the table; "" for the table of kernels.
        folder: folder of the tables; None for `benchmarks/results`.
    """
    name = f"{measured_on()['device'].replace('NVIDIA ', '')} {table}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (folder or RESULTS) / f"{slug}.csv"


def measured(table: str, columns: Sequence[str], folder: Path | None = None) -> set[tuple[str, ...]]:
    """Return the values of some columns in the rows that this device's table already has.

    Args:
        table: name of the table.
        columns: names of the columns.
        folder: folder of the tables; None for `benchmarks/results`.
    """
    path = path_of(table, folder)
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(file)}


def append(row: Mapping[str, Any], table: str = "", folder: Path | None = None) -> dict[str, Any]:
    """Write a row to this device's table at once, so that a run that is stopped keeps its rows.

    Args:
        row: columns after the date and those of `measured_on`.
        table: name of the table, `<device>-<table>.csv`; rows with other columns need another table.
        folder: folder of the tables; None for `benchmarks/results`.

    Returns:
        The row with all columns.
    """
    row = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **measured_on(), **row}
    path = path_of(table, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = path.read_text().partition("\n")[0].strip() if path.exists() else ",".join(row)
    assert header == ",".join(row), f"{path} has other columns than this version writes: move it away"
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
    return row


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], write: Callable[[str], Any] = print) -> None:
    """Print some columns of rows as an aligned table."""
    table = [list(columns), *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if rows else []:
        write("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
