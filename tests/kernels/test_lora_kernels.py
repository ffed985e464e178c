"""The Triton kernels of a LoRA linear: run in Triton's interpreter against float64, and compiled for other GPUs."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2f_fast.kernels import lora_kernels
from d2f_fast.kernels.lora_dispatch import Tile

PADDING = 64  # elements of NaN before and after every tensor that a kernel uses; it keeps 16-byte alignment
TILE = Tile(32, 32, 32, 4, 2)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")


def padded(tensor: Tensor) -> Tensor:
    buffer = tensor.new_full((tensor.numel() + 2 * PADDING,), float("nan"))
    inside = buffer[PADDING : PADDING + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new tensors with NaN, and fail if a kernel wrote before or after one."""
    new_empty, buffers = Tensor.new_empty, []

    def poisoned(like: Tensor, *size: Any, **options: Any) -> Tensor:
        shape = new_empty(like, *size, device="meta").shape
        buffer = like.new_full((shape.numel() + 2 * PADDING,), float("nan"), **options)
        buffers.append(buffer)
        return buffer[PADDING : PADDING + shape.numel()].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    yield
    assert buffers
    for buffer in buffers:
        assert buffer[:PADDING].isnan().all() and buffer[-PADDING:].isnan().all()


def launches(rows: int, n: int, k: int, rank: int, dtype: torch.dtype, tile: Tile) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every output of the kernels by name, beside the float64 truth of the same operands."""
    shapes = {"x": (rows, k), "w": (n, k), "bias": (n,), "a": (rank, k), "b": (n, rank), "dy": (rows, n)}
    t = {name: padded(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    t["s"], t["ds"] = padded(torch.randn(rows, rank).to(dtype)), padded(torch.randn(rows, rank).to(dtype))
    d = {name: tensor.double() for name, tensor in t.items()}
    ds, db = lora_kernels.launch_backward_ds_db(t["dy"], t["s"], t["b"], tile, one_pass=True)
    ds_alone, db_alone = lora_kernels.launch_backward_ds_db(t["dy"], t["s"], t["b"], tile, one_pass=False)
    wide = F.linear(d["x"], d["w"]) + d["s"] @ d["b"].t()
    without = lora_kernels.launch_forward(t["x"], t["w"], None, t["s"], t["b"], tile)
    return {
        "s": (lora_kernels.launch_shrink(t["x"], t["a"], tile), d["x"] @ d["a"].t()),
        "y": (lora_kernels.launch_forward(t["x"], t["w"], t["bias"], t["s"], t["b"], tile), wide + d["bias"]),
        "y without bias": (without, wide),
        "ds": (ds, d["dy"] @ d["b"]),
        "ds alone": (ds_alone, d["dy"] @ d["b"]),
        "db": (db, d["dy"].t() @ d["s"]),
        "db alone": (db_alone, d["dy"].t() @ d["s"]),
        "dx": (
            lora_kernels.launch_backward_dx(t["dy"], t["w"], t["ds"], t["a"], tile),
            d["dy"] @ d["w"] + d["ds"] @ d["a"],
        ),
        "da": (lora_kernels.launch_backward_da(t["ds"], t["x"], tile), d["ds"].t() @ d["x"]),
    }


# The cases have rows that fill no block, padded ranks, features that 32 does not divide, and blocks of 16.
CASES = [(1, 32, 32, 1), (63, 48, 32, 4), (70, 32, 80, 24), (33, 16, 16, 128), (40, 64, 32, 16), (200, 32, 48, 64)]


@interpreted
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_float64_and_write_only_their_outputs(case: tuple[int, int, int, int]) -> None:
    for name, (got, want) in launches(*case, torch.float32, TILE).items():
        assert got.dtype == torch.float32 and got.is_contiguous()
        # Sums of up to 80 products of normal numbers, each rounded at 6e-8, are within 1e-5 of the largest term.
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_16_bit_kernels_are_within_an_ulp(dtype: torch.dtype, ulp: float) -> None:
    for name, (got, want) in launches(40, 48, 32, 8, dtype, TILE).items():
        wide = name.startswith("d") and name[1] in "ab"
        assert got.dtype == (torch.float32 if wide else dtype), name
        # The one rounding, at the store, is a truncation in the interpreter: an ulp. Sums over the rows stay float32.
        tolerance = 1e-5 if wide else ulp
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def in_torch(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the kernels in plain torch, in the type of the operands."""
    y = F.linear(x, w, bias) + s @ b.t()
    return {"s": x @ a.t(), "y": y, "ds": dy @ b, "db": dy.t() @ s, "dx": dy @ w + s @ a, "da": s.t() @ x}


@interpreted
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero adapter"])
def test_16_bit_error_is_at_most_that_of_torch(zero: bool) -> None:
    """The type is float16, which the interpreter rounds as a GPU does; `test_lora_on_a_gpu.py` tests bfloat16."""
    rows, n, k, rank = 200, 64, 48, 16
    shapes = ((rows, k), (n, k), (n,), (rank, k), (n, rank), (rows, rank), (rows, n))
    x, w, bias, a, b, s, dy = operands = [torch.randn(shape).half() for shape in shapes]
    if zero:
        b.zero_()
    exact, plain = in_torch(*(tensor.double() for tensor in operands)), in_torch(*operands)
    ds, db = lora_kernels.launch_backward_ds_db(dy, s, b, TILE)
    got = {
        "s": lora_kernels.launch_shrink(x, a, TILE),
        "y": lora_kernels.launch_forward(x, w, bias, s, b, TILE),
        **{"ds": ds, "db": db, "da": lora_kernels.launch_backward_da(s, x, TILE)},
        "dx": lora_kernels.launch_backward_dx(dy, w, s, a, TILE),
    }
    for name, truth in exact.items():
        ours, theirs = (float((result[name].double() - truth).norm()) for result in (got, plain))
        assert ours <= 1.2 * theirs, (name, ours, theirs)
    base = F.linear(x, w, bias).double() - F.linear(x.double(), w.double(), bias.double())
    assert not zero or (got["y"].double() - exact["y"]).norm() <= 1.2 * base.norm()


@interpreted
def test_sums_over_rows_give_the_same_bits_on_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_kernels, "BLOCKS", 2)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(launches(150, 16, 16, 4, torch.float32, TILE))  # five blocks of rows in three parts
    for name, (first, want) in runs[0].items():
        torch.testing.assert_close(first.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(first, runs[1][name][0]), name


@interpreted
def test_strided_operands_are_read_correctly() -> None:
    x, s = torch.randn(32, 20).t(), torch.randn(20, 16)[:, ::2]
    w, b = torch.randn(32, 16).t(), torch.randn(8, 16).t()
    got = lora_kernels.launch_forward(x, w, None, s, b, TILE)
    torch.testing.assert_close(got, x @ w.t() + s @ b.t(), rtol=1e-5, atol=1e-5)
    dy = torch.ones(()).expand(20, 16)  # the gradient that .sum().backward() passes on
    for got, want in zip(lora_kernels.launch_backward_ds_db(dy, s, b, TILE), (dy @ b, dy.t() @ s), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@interpreted
def test_every_kernel_is_launched_on_the_device_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []
    left: list[Tensor] = []

    @contextmanager
    def on_device(operand: Tensor) -> Iterator[None]:
        entered.append(operand)
        yield
        left.append(operand)

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda x, *_, **__: kernels.append(len(entered) == len(left) + 1 and entered[-1] is x)

    kernels: list[bool] = []
    monkeypatch.setattr(lora_kernels, "on_device", on_device)
    for name in ("_narrow_kernel", "_wide_kernel", "_grad_b_kernel", "_rows_sum_kernel"):
        monkeypatch.setattr(lora_kernels, name, Kernel())
    launches(40, 16, 32, 4, torch.float32, TILE)
    assert kernels and all(kernels)


@interpreted
def test_no_rows_launch_nothing() -> None:
    for name, (got, want) in launches(0, 16, 32, 4, torch.float32, TILE).items():
        assert got.shape == want.shape and torch.equal(got.double(), want), name


@interpreted
@pytest.mark.parametrize("launch", ["shrink", "forward", "dx", "ds_db in one pass", "ds_db", "da"])
def test_offsets_beyond_32_bits_are_right(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # of 8 GB, only a few pages are ever touched
    width, tile = 16, TILE._replace(m=128)
    rows = 2**31 // width + 40
    monkeypatch.setattr(lora_kernels, "BLOCKS", 1)
    for name in ("_narrow_kernel", "_wide_kernel", "_grad_b_kernel", "_rows_sum_kernel"):
        monkeypatch.setattr(lora_kernels, name, LastBlock(getattr(lora_kernels, name)))
    last = slice(rows // tile.m * tile.m, rows)
    x, narrow = torch.empty(rows, width, dtype=torch.float16), torch.empty(rows, 4, dtype=torch.float16)
    wide_end, narrow_end = x[last].normal_().double(), narrow[last].normal_().double()
    w, a, b = torch.randn(width, width).half(), torch.randn(4, width).half(), torch.randn(width, 4).half()
    if launch == "shrink":
        got, want = lora_kernels.launch_shrink(x, a, tile)[last], wide_end @ a.double().t()
    elif launch == "forward":
        got = lora_kernels.launch_forward(x, w, None, narrow, b, tile)[last]
        want = wide_end @ w.double().t() + narrow_end @ b.double().t()
    elif launch == "dx":
        got = lora_kernels.launch_backward_dx(x, w, narrow, a, tile)[last]
        want = wide_end @ w.double() + narrow_end @ a.double()
    elif launch == "da":
        monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)  # for the parts of the blocks that do not run
        got, want = lora_kernels.launch_backward_da(narrow, x, tile), narrow_end.t() @ wide_end
    else:
        ds, _ = lora_kernels.launch_backward_ds_db(x, narrow, b, tile, one_pass="one" in launch)
        got, want = ds[last], wide_end @ b.double()
    torch.testing.assert_close(got.double(), want, rtol=2**-9, atol=2**-9)


class LastBlock:
    """Kernel that runs only its last program along the rows; all of them would take weeks in the interpreter."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime.interpreter import interpreter_builder

        def launch(*args: Any, **kwargs: Any) -> None:
            set_grid_idx = interpreter_builder.set_grid_idx

            def shifted(x: int, y: int, z: int) -> None:
                interpreter_builder.set_grid_dim(*grid, *[1] * (3 - len(grid)))
                set_grid_idx(grid[0] - 1, y, z)

            interpreter_builder.set_grid_idx = shifted
            try:
                self.kernel[(1, *grid[1:])](*args, **kwargs)
            finally:
                interpreter_builder.set_grid_idx = set_grid_idx

        return launch


@pytest.mark.parametrize(("n", "rank"), [(24, 4), (32, 129), (32, 0)])
def test_features_and_ranks_that_kernels_do_not_serve_are_refused(n: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 16 and rank 1 to 128, got {n} and {rank}"):
        lora_kernels.launch_shrink(torch.zeros(2, n), torch.zeros(rank, n), TILE)


def compiled_kernels(*arguments: str) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot_lora_linear.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [("90", "16,128"), pytest.param(("80,86,89,90,120", "16,32,48,64,128"), marks=pytest.mark.slow)],
    ids=["one card", "every entry"],
)
def test_every_table_entry_compiles_within_the_limits_of_its_card(arguments: tuple[str, str]) -> None:
    reports = compiled_kernels(*arguments)
    seen = {(name.split()[0], name.split()[1]) for name in reports}
    kernels = ("narrow", "wide", "rows_sum", "grad_b")
    assert seen == set(itertools.product((f"sm_{cc}" for cc in arguments[0].split(",")), kernels))
    faults = {}
    for name, report in reports.items():
        good = report["spills"] == report["stack"] == 0 and report["shared"] <= report["shared_limit"]
        good &= report["wide_loads"] > 0 and report["wide_stores"] > 0
        if name.startswith("sm_90"):
            good &= report["wgmma"] == report["wgmma_bf16"] > 0  # bf16, and no tf32
        else:
            good &= report["mma"] > 0
        if not good:
            faults[name] = report
    assert not faults
