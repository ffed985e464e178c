"""Predict the time of each kernel on an H200 from its bytes, its operations and its machine code; nothing is measured.

    python -m benchmarks.expected_times              # prints the tables of LOG.md, in a minute, without a GPU

The kernels are compiled for sm_90 by the Triton that is installed. A kernel takes

    LAUNCH + the largest of: bytes of device memory / its rate
                             bytes that its programs read from the L2 cache / its rate
                             operations / (rate of the tensor cores x share of the programs' places that are filled)

The rate of device memory is also bounded by the bytes that are on their way at once: those that each program asks for
ahead, times the programs that fit on a multiprocessor beside each other by registers and shared memory, over LATENCY.
Products of cuBLAS are predicted in the same way, by the best of CUBLAS_BLOCKS. The constants are values of data sheets
and the shares of them that good kernels reach; a measured row tells which is wrong.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from d2f_fast.kernels import align, velocity_loss
from d2f_fast.kernels.lora_dispatch import ADDMM_SHAPES, NARROW_TABLE, SPLIT_SHAPES, TABLE, Tile, rank_bucket
from d2f_fast.kernels.lora_kernels import BLOCKS, _dividing

CAPABILITY, MULTIPROCESSORS = 90, 132
# Of one multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability): registers, bytes
# of shared memory, of which each program takes 1024 more than it asks for, threads and programs.
REGISTERS, SHARED, RESERVED, THREADS, PROGRAMS = 65536, 228 * 1024, 1024, 2048, 32
MEMORY_RATE = 0.9 * 4.8e12  # bytes per second: data sheet, and the share that a copy reaches
L2_RATE = 0.8 * 5120 * 1.8e9  # 5120 bytes per clock at 1.8 GHz
TENSOR_RATE = 989e12  # dense bfloat16 operations per second, data sheet
TRITON_SHARE, CUBLAS_SHARE = 0.65, 0.8
LATENCY = 0.8e-6  # seconds from a request to its bytes under load
LAUNCH = 2e-6  # seconds of a kernel in a CUDA graph that does nothing
BYTES = 2  # of bfloat16
BATCH_ROWS = {320: 65536, 640: 16384, 1280: 4096}  # of 16 images of SD1.5, by the fewer of a layer's features
TEXT_FEATURES, TEXT_ROWS = (768, 1024, 2048), 16 * 77
TESTS = Path(__file__).parents[1] / "tests/kernels"


@dataclass(frozen=True)
class Code:
    """What a compiled kernel takes.

    Args:
        registers: registers of a thread.
        shared: bytes of shared memory of a program.
        warps: warps of a program.
    """

    registers: int
    shared: int
    warps: int

    @property
    def per_multiprocessor(self) -> int:
        """Return how many programs run on one multiprocessor at once."""
        threads = 32 * self.warps
        # Registers are given to a warp in units of 256.
        by_registers = REGISTERS // (math.ceil(32 * self.registers / 256) * 256 * self.warps)
        by_shared = SHARED // (self.shared + RESERVED)
        return min(by_registers, by_shared, THREADS // threads, PROGRAMS)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        memory: bytes read from and written to device memory, each once.
        l2: bytes that all programs read.
        operations: operations on tensor cores.
        programs: number of programs.
        ahead: bytes that one program asks for before it waits.
    """

    memory: float
    l2: float
    operations: float
    programs: int
    ahead: float


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a launch, and what bounds it."""

    microseconds: float
    bound: str


def predict(launch: Launch, code: Code, share: float = TRITON_SHARE) -> Prediction:
    """Return the predicted time of a launch.

    Args:
        launch: bytes, operations and programs.
        code: resources of the compiled kernel.
        share: share of the tensor cores' rate that its inner loop reaches.
    """
    places = MULTIPROCESSORS * code.per_multiprocessor
    filled = launch.programs / (math.ceil(launch.programs / places) * places)
    on_their_way = min(launch.programs, places) * launch.ahead
    memory_rate = min(MEMORY_RATE, on_their_way / LATENCY)
    seconds = {
        "memory" if memory_rate == MEMORY_RATE else "latency": launch.memory / memory_rate,
        "L2": launch.l2 / L2_RATE,
        "tensor cores": launch.operations / (TENSOR_RATE * share * filled),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Prediction(1e6 * (LAUNCH + seconds[bound]), bound)


def wide(rows: int, n: int, k: int, rank: int, tile: Tile) -> Launch:
    """Return the launch of y = x Wᵀ + s (scale B)ᵀ."""
    m, columns = tile.m, _dividing(tile.n, n)
    programs = math.ceil(rows / m) * (n // columns)
    moved = BYTES * (rows * (k + rank + n) + n * (k + rank))
    block = _dividing(tile.k, k)
    return Launch(
        memory=moved,
        l2=BYTES * programs * (m + columns) * (k + rank),
        operations=2 * rows * n * (k + rank_bucket(rank)),
        programs=programs,
        ahead=BYTES * (tile.stages - 1) * block * (m + columns),
    )


def narrow(rows: int, k: int, rank: int, tile: Tile) -> Launch:
    """Return the launch of s = x Aᵀ, or of ds = dy (scale B)."""
    programs, bucket, block = math.ceil(rows / tile.m), rank_bucket(rank), _dividing(tile.k, k)
    return Launch(
        memory=BYTES * (rows * (k + rank) + k * rank),
        l2=BYTES * programs * k * (tile.m + rank),
        operations=2 * rows * k * bucket,
        programs=programs,
        ahead=BYTES * (tile.stages - 1) * block * (tile.m + rank),
    )


def one_pass(rows: int, n: int, rank: int, tile: Tile) -> Launch:
    """Return the launch of ds and the parts of dB in one pass over dy."""
    programs, bucket, block = math.ceil(rows / tile.m), rank_bucket(rank), _dividing(tile.n, n)
    return Launch(
        memory=BYTES * (rows * (n + 2 * rank) + n * rank) + 4 * programs * n * rank,
        l2=BYTES * programs * n * (tile.m + rank),
        operations=4 * rows * n * bucket,
        programs=programs,
        ahead=BYTES * (tile.stages - 1) * block * (tile.m + rank),
    )


def rows_sum(rows: int, n: int, rank: int, tile: Tile) -> Launch:
    """Return the launch of the parts of dA = dsᵀ x."""
    blocks, columns, bucket = math.ceil(rows / (tile.m * BLOCKS)), _dividing(tile.n, n), rank_bucket(rank)
    programs = blocks * (n // columns)
    return Launch(
        memory=BYTES * rows * (n + rank) + 4 * blocks * n * rank,
        l2=BYTES * programs * BLOCKS * tile.m * (columns + rank),
        operations=2 * rows * n * bucket,
        programs=programs,
        ahead=BYTES * (tile.stages - 1) * tile.m * (columns + rank),
    )


def elementwise(elements: int, read: int, written: int, block: int) -> Launch:
    """Return the launch of a kernel that reads and writes so many bytes for each element."""
    moved = elements * (read + written)
    return Launch(moved, 0, 0, math.ceil(elements / block), block * read)


CUBLAS = Code(registers=168, shared=200 * 1024, warps=12)  # a persistent kernel fills a multiprocessor by itself
CUBLAS_BLOCKS = ((128, 256), (256, 128), (128, 192), (128, 128), (128, 64), (64, 64))


def cublas(rows: int, n: int, k: int, *, added: bool = False) -> Prediction:
    """Return the prediction of a product by cuBLAS, which may be added to what is there, by its best block.

    Two programs share what they read of the weight.
    """
    found = []
    for m, columns in CUBLAS_BLOCKS:
        across = math.ceil(n / columns)
        programs, read = math.ceil(rows / m) * across, m + min(columns, n) / 2
        launch = Launch(
            memory=BYTES * (rows * (k + n * (1 + added)) + n * k),
            l2=BYTES * programs * read * k,
            operations=2 * rows * across * columns * k,
            programs=programs,
            ahead=BYTES * 3 * 64 * read,
        )
        found.append(predict(launch, CUBLAS, CUBLAS_SHARE))
    return min(found, key=lambda each: each.microseconds)


def cublas_over_rows(rows: int, n: int, rank: int) -> Prediction:
    """Return the prediction of dyᵀ s by cuBLAS, which divides the rows among all multiprocessors."""
    moved = BYTES * rows * (n + rank)
    return predict(Launch(moved, moved, 2 * rows * n * 64, MULTIPROCESSORS, BYTES * 3 * 64 * (128 + 64)), CUBLAS)


def reports(*ranks: int) -> dict[str, dict[str, int]]:
    """Compile the kernels of the dispatch table, and return what each takes by its name."""
    arguments = [["aot_lora_linear.py", str(CAPABILITY), ",".join(map(str, ranks))]]
    arguments += [[f"aot_{name}.py", str(CAPABILITY)] for name in ("align", "velocity_loss")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parents[1]), environment.get("PYTHONPATH", "")])
    found: dict[str, dict[str, int]] = {}
    for script, *rest in arguments:
        command = [sys.executable, str(TESTS / script), *rest]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        kernel = script.removeprefix("aot_").removesuffix(".py")
        found |= {f"{kernel} {name}": report for name, report in json.loads(printed).items()}
    return found


def code_of(found: Mapping[str, Mapping[str, int]], kernel: str, rank: int, tile: Tile, suffix: str) -> Code:
    """Return what a LoRA kernel takes.

    Args:
        found: reports by name.
        kernel: "wide", "narrow", "grad_b" or "rows_sum".
        rank: rank of the adapter.
        tile: its blocks.
        suffix: end of the report's name, which says the direction; "" for none.
    """
    name = f"lora_linear sm_{CAPABILITY} {kernel} r{rank} {tuple(tile)}{suffix and ' '}{suffix}"
    return Code(found[name]["registers"], found[name]["shared"], tile.warps)


def resources(found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield the lines of the table of what each kernel takes."""
    heads = ["kernel, blocks (m, n, k, warps, stages)", "registers", "shared memory, KiB", "programs at once"]
    yield f"| {' | '.join([*heads, 'spills', '16-byte loads, stores', 'wgmma in bf16'])} |"
    yield "|---|---|---|---|---|---|---|"
    for name, report in found.items():
        warps = velocity_loss.NUM_WARPS if name.startswith("velocity_loss") else align.NUM_WARPS
        warps = 4 if name.endswith(" sum") else warps
        if "(" in name:
            warps = int(name.partition("(")[2].split(", ")[3])
        code = Code(report["registers"], report["shared"], warps)
        cells = [name.replace(f"sm_{CAPABILITY} ", ""), code.registers, f"{code.shared / 1024:.0f}"]
        cells += [code.per_multiprocessor, report["spills"]]
        cells += [f"{report['wide_loads']}, {report['wide_stores']}", report["wgmma_bf16"]]
        yield f"| {' | '.join(map(str, cells))} |"


def layer(found: Mapping[str, Mapping[str, int]], n: int, k: int, rank: int) -> str:
    """Return the line of the predicted times of one layer."""
    rows, bucket = TEXT_ROWS if k in TEXT_FEATURES else BATCH_ROWS[min(n, k)], rank_bucket(rank)
    entry, tiles = TABLE[CAPABILITY, n, k, bucket], NARROW_TABLE[CAPABILITY, bucket]
    shrink = predict(narrow(rows, k, rank, tiles.shrink), code_of(found, "narrow", rank, tiles.shrink, "s"))
    y = predict(wide(rows, n, k, rank, entry.forward), code_of(found, "wide", rank, entry.forward, "y"))
    dx = predict(wide(rows, k, n, rank, entry.grad_x), code_of(found, "wide", rank, entry.grad_x, "dx"))
    da = predict(rows_sum(rows, k, rank, tiles.rows_sum), code_of(found, "rows_sum", rank, tiles.rows_sum, ""))
    assert tiles.grad_b is not None
    ds = predict(one_pass(rows, n, rank, tiles.grad_b), code_of(found, "grad_b", rank, tiles.grad_b, ""))
    base, dx_base = cublas(rows, n, k), cublas(rows, k, n)
    addmm = [cublas(rows, rank, k), base, cublas(rows, n, rank, added=True)]
    back = [
        cublas(rows, rank, n),
        cublas_over_rows(rows, n, rank),
        cublas_over_rows(rows, k, rank),
        dx_base,
        cublas(rows, k, rank, added=True),
    ]
    cells = [f"{rows} × {k} → {n}, r{rank}", TABLE[CAPABILITY, n, k, bucket].path]
    cells += [f"{each.microseconds:.0f} ({each.bound})" for each in (shrink, y, ds, dx, da)]
    forward, backward = shrink.microseconds + y.microseconds, sum(each.microseconds for each in (ds, dx, da))
    totals = (base.microseconds, forward, sum(each.microseconds for each in addmm))
    totals += (base.microseconds + dx_base.microseconds, forward + backward)
    totals += (sum(each.microseconds for each in (*addmm, *back)),)
    return f"| {' | '.join([*cells, *(f'{each:.0f}' for each in totals)])} |"


def layers(found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield the lines of the table of LoRA linears; the sums over the parts of dA and dB are left out everywhere."""
    yield "| rows × K → N | path | s | y | ds, dB | dx | dA | base | split | addmm | base, both | split, both |" \
        " addmm, both |"  # fmt: skip
    yield "|" + "---|" * 13
    for n, k in SPLIT_SHAPES + ADDMM_SHAPES:
        yield layer(found, n, k, 48 if n == 3 * k else 16)


def objective(found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield the lines of the table of the alignment kernels."""
    yield "| kernel | elements | time, µs |"
    yield "|---|---|---|"
    # Bytes read and written for each element: latents and noise to a sample; output, latents and noise to a float32
    # error; and the error to a gradient, which is plain torch of the same form as align.
    parts = {"align": ("align", 4, 2), "loss": ("velocity_loss", 6, 4), "gradient": ("align", 4, 2)}
    for batch, side in ((16, 64), (512, 128)):
        elements = batch * 4 * side * side
        for name, (kernel, read, written) in parts.items():
            code = Code(found[f"{kernel} sm_{CAPABILITY} bf16"]["registers"], 0, align.NUM_WARPS)
            took = predict(elementwise(elements, read, written, align.BLOCK), code)
            yield f"| {name} | {batch} × 4 × {side} × {side} | {took.microseconds:.1f} ({took.bound}) |"


if __name__ == "__main__":
    compiled = reports(16, 48)
    print(*resources(compiled), "", *layers(compiled), "", *objective(compiled), sep="\n")
