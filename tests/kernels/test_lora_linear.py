"""The LoRA linear: its kernels in Triton's interpreter against float64, its operation against plain torch."""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from d2f_fast.kernels import lora_dispatch, lora_kernels, lora_linear
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE, TABLE, Tile, choose_path
from d2f_fast.kernels.lora_linear import lora_linear_packed, lora_linear_reference

NAMES = ("x", "lora_a", "lora_b")
PADDING = 64  # elements of NaN on either side of every tensor that a kernel reads or writes; keeps 16-byte alignment
TILE = Tile(32, 32, 32, 4, 2)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")


def padded(tensor: Tensor) -> Tensor:
    buffer = tensor.new_full((tensor.numel() + 2 * PADDING,), float("nan"))
    inside = buffer[PADDING : PADDING + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new tensors with NaN, and fail where a kernel has written beside one."""
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
    """Every output of the kernels by name, beside the float64 truth of the same operands."""
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


# Rows that fill no block, ranks that are padded, features that 32 does not divide, and blocks of 16.
CASES = [(1, 32, 32, 1), (63, 48, 32, 4), (70, 32, 80, 24), (33, 16, 16, 128), (40, 64, 32, 16), (200, 32, 48, 64)]


@interpreted
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_float64_and_touch_nothing_else(case: tuple[int, int, int, int]) -> None:
    for name, (got, want) in launches(*case, torch.float32, TILE).items():
        assert got.dtype == torch.float32 and got.is_contiguous()
        # 1e-5 of the largest term: sums of up to 80 products of normal numbers, each rounded at 6e-8.
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_16_bit_kernels_are_within_an_ulp(dtype: torch.dtype, ulp: float) -> None:
    for name, (got, want) in launches(40, 48, 32, 8, dtype, TILE).items():
        wide = name.startswith("d") and name[1] in "ab"
        assert got.dtype == (torch.float32 if wide else dtype), name
        # One rounding, at the store, which the interpreter truncates: an ulp; sums over the rows stay float32.
        tolerance = 1e-5 if wide else ulp
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def in_torch(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What the kernels compute, in plain torch, in the type of the operands."""
    y = F.linear(x, w, bias) + s @ b.t()
    return {"s": x @ a.t(), "y": y, "ds": dy @ b, "db": dy.t() @ s, "dx": dy @ w + s @ a, "da": s.t() @ x}


@interpreted
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero adapter"])
def test_16_bit_products_are_as_near_float64_as_torchs(zero: bool) -> None:
    """In float16, which the interpreter rounds as a GPU does; bfloat16 in `tests/test_lora_on_a_gpu.py`."""
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
def test_sums_over_the_rows_add_their_parts_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_kernels, "BLOCKS", 2)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(launches(150, 16, 16, 4, torch.float32, TILE))  # five blocks of rows, three parts
    for name, (first, want) in runs[0].items():
        torch.testing.assert_close(first.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(first, runs[1][name][0]), name


@interpreted
def test_strided_operands_are_copied_and_not_misread() -> None:
    x, s = torch.randn(32, 20).t(), torch.randn(20, 16)[:, ::2]
    w, b = torch.randn(32, 16).t(), torch.randn(8, 16).t()
    got = lora_kernels.launch_forward(x, w, None, s, b, TILE)
    torch.testing.assert_close(got, x @ w.t() + s @ b.t(), rtol=1e-5, atol=1e-5)
    dy = torch.ones(()).expand(20, 16)  # what .sum().backward() sends
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
    torch.utils.deterministic.fill_uninitialized_memory = False  # 8 GB, of which a few pages are ever touched
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
        monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)  # the parts of the blocks that did not run
        got, want = lora_kernels.launch_backward_da(narrow, x, tile), narrow_end.t() @ wide_end
    else:
        ds, _ = lora_kernels.launch_backward_ds_db(x, narrow, b, tile, one_pass="one" in launch)
        got, want = ds[last], wide_end @ b.double()
    torch.testing.assert_close(got.double(), want, rtol=2**-9, atol=2**-9)


class LastBlock:
    """A kernel of which the last program along the rows runs alone: all of them would take the interpreter weeks."""

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
def test_a_kernel_refuses_what_it_was_not_written_for(n: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 16 and rank 1 to 128, got {n} and {rank}"):
        lora_kernels.launch_shrink(torch.zeros(2, n), torch.zeros(rank, n), TILE)


def operands(
    *leading: int, n: int = 48, k: int = 32, rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Operands of lora_linear; x, A and B require gradients, A and B are float32 (float64 beside it)."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(*leading, k).to(dtype).requires_grad_(),
        "weight": torch.randn(n, k).to(dtype) / k**0.5,
        "lora_a": torch.randn(rank, k, dtype=master).requires_grad_(),
        "lora_b": torch.randn(n, rank, dtype=master).requires_grad_(),
        "bias": torch.randn(n).to(dtype),
    }


def results(function: Callable[..., Tensor], t: dict[str, Any], seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Output and gradients, by name, for a fixed random upstream gradient."""
    y = function(**t, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    wanted = {name: tensor for name, tensor in t.items() if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), upstream)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.fixture(params=["addmm", "split"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(PATH_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("leading", [(1,), (63,), (2, 3, 5), (0,), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_plain_torch(path: str, leading: tuple[int, ...], bias: bool) -> None:
    t = operands(*leading)
    t = t if bias else {**t, "bias": None}  # type: ignore[dict-item]
    got, want = results(lora_linear.lora_linear, t), results(lora_linear_reference, t)
    assert got.keys() == want.keys() == {"y", *NAMES}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-5)
        # A scale of 1 changes no bit; one row alone is a matrix times a vector, which adds up in another order.
        assert torch.equal(got[name], want[name]) or leading in [(1,), ()], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_that_of_plain_torch(path: str, dtype: torch.dtype) -> None:
    t = operands(200, n=64, k=64, rank=16, dtype=dtype)
    got = results(lora_linear.lora_linear, t, scale=0.7)
    cast = {name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for name, tensor in t.items()}
    plain = results(lora_linear_reference, cast, scale=0.7)
    exact = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in t.items()}
    truth = results(lora_linear_reference, exact, scale=0.7)
    for name, want in truth.items():
        assert got[name].dtype == (torch.float32 if name.startswith("lora") else dtype), name
        errors = [((result[name].double() - want).norm() / want.norm()).item() for result in (got, plain)]
        assert errors[0] <= 1.2 * errors[1], (name, errors)


def test_zero_lora_is_the_base_linear(path: str) -> None:
    t = operands(70)
    t["lora_b"] = torch.zeros_like(t["lora_b"], requires_grad=True)
    with torch.no_grad():
        assert torch.equal(lora_linear.lora_linear(**t), F.linear(t["x"], t["weight"], t["bias"]))


def test_is_linear_in_x(path: str) -> None:
    t = {**operands(9), "bias": None}
    double = lora_linear.lora_linear(**{**t, "x": 2 * t["x"]})
    torch.testing.assert_close(double, 2 * lora_linear.lora_linear(**t), rtol=0, atol=0)


def test_strides_of_x_do_not_matter_and_x_is_left_alone(path: str) -> None:
    base = torch.randn(32, 6, 5)
    x = base.permute(1, 2, 0).requires_grad_()
    t, version = operands(6, 5), base._version
    got = results(lora_linear.lora_linear, {**t, "x": x})
    want = results(lora_linear.lora_linear, {**t, "x": x.detach().contiguous().requires_grad_()})
    assert base._version == version
    for name in want:
        # Another layout, another order of sums: eps * K * |x| |w| in the worst case, with K = 32 and values up to 10.
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-5)


def test_trained_base_weights_and_biases_get_their_gradients(path: str) -> None:
    t = operands(7)
    t["weight"].requires_grad_()
    t["bias"].requires_grad_()
    got, want = results(lora_linear.lora_linear, t), results(lora_linear_reference, t)
    assert got.keys() == {"y", *t}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wanted", [{"x"}, {"lora_a"}, {"lora_b"}, {"x", "lora_b"}], ids=lambda names: "+".join(sorted(names))
)
def test_only_what_is_needed_is_computed_and_kept(path: str, wanted: set[str]) -> None:
    t = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in operands(50).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        got = results(lora_linear.lora_linear, t)
    want = results(lora_linear_reference, t)
    assert got.keys() == {"y", *wanted}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
    rows_kept = sum(tensor.shape[1] for tensor in kept if tensor.shape[0] == 50)
    assert rows_kept == 32 * ("lora_a" in wanted) + 4 * ("lora_b" in wanted)
    assert any(tensor.data_ptr() == t["weight"].data_ptr() for tensor in kept) == ("x" in wanted)


def test_nothing_but_x_and_s_is_kept(path: str) -> None:
    t, kept = operands(2, 25), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), id):
        lora_linear.lora_linear(**t)
    known = {tensor.data_ptr() for tensor in t.values()}
    assert {tuple(tensor.shape) for key, tensor in kept.items() if key not in known} == {(50, 4)}
    assert t["x"].data_ptr() in kept


def test_a_second_derivative_is_refused(path: str) -> None:
    t = operands(5)
    (grad,) = torch.autograd.grad(lora_linear.lora_linear(**t).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_operands_that_are_not_contiguous_give_the_same(path: str, name: str) -> None:
    t = operands(9)
    strided = torch.stack([t[name].detach(), torch.full_like(t[name], float("nan"))], -1)[..., 0]
    assert not strided.is_contiguous()
    got = results(lora_linear.lora_linear, {**t, name: strided.requires_grad_(t[name].requires_grad)})
    want = results(lora_linear.lora_linear, t)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-5)


def test_gradients_pass_gradcheck(path: str) -> None:
    t = operands(5, n=16, k=16, rank=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear.lora_linear(x, t["weight"], a, b, t["bias"], 0.7), [t[name] for name in NAMES]
    )


def test_ops_declare_what_they_do() -> None:
    x, w, a, b, bias = (tensor.detach() for tensor in operands(6).values())
    s, dy, op = x @ a.t(), torch.randn(6, 48), torch.ops.d2f_fast
    torch.library.opcheck(op.lora_shrink.default, (x, a))
    for forward, backward_dx in (
        (op.lora_forward, op.lora_backward_dx),
        (op.lora_forward_addmm, op.lora_backward_dx_addmm),
    ):
        torch.library.opcheck(forward.default, (x, w, bias, s, b))
        torch.library.opcheck(backward_dx.default, (dy, w, s, a))
    torch.library.opcheck(op.lora_backward_ds_db.default, (dy, s, b))
    torch.library.opcheck(op.lora_backward_da.default, (s, x))
    fake = torch.ops.d2f_fast.lora_backward_da(s.bfloat16().to("meta"), x.bfloat16().to("meta"))
    assert fake.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break_and_once(path: str, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lora_linear.lora_linear, backend=counter, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        t = operands(3, 7)
        got, want = results(compiled, t, scale=0.5), results(lora_linear.lora_linear, t, scale=0.5)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def test_autocast_decides_the_type_of_the_product(path: str) -> None:
    t = operands(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(lora_linear.lora_linear, t)  # backward inside too: it must not round what is float32
    cast = {n: v if n.startswith("lora") else v.detach().bfloat16().requires_grad_(n == "x") for n, v in t.items()}
    want = results(lora_linear.lora_linear, cast)
    assert got["y"].dtype == torch.bfloat16 and got["x"].dtype == torch.float32
    for name in want:
        assert torch.equal(got[name], want[name].to(got[name].dtype)), name


def test_export_sees_plain_torch(path: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
            return lora_linear.lora_linear(x, weight, lora_a, lora_b, bias, 0.5)

    t = {name: tensor.detach() for name, tensor in operands(5).items()}
    program = torch.export.export(Layer(), (), t)
    assert not [node for node in program.graph.nodes if "d2f_fast" in str(node.target)]
    assert torch.equal(program.module()(**t), lora_linear_reference(**t, scale=0.5))


@pytest.mark.parametrize("joined", [True, False], ids=["one weight", "several weights"])
def test_packed_layers_give_the_numbers_of_separate_ones(path: str, joined: bool) -> None:
    layers = [operands(2, 9, n=n, rank=rank) for n, rank in ((48, 4), (16, 4), (32, 7))]
    scales, x = (1.0, 0.5, 2.0), layers[0]["x"]
    weights, biases, a, b = ([layer[key] for layer in layers] for key in ("weight", "bias", "lora_a", "lora_b"))
    packed = lora_linear_packed(
        x, torch.cat(weights) if joined else weights, a, b, torch.cat(biases) if joined else biases, scales
    )
    separate = [lora_linear.lora_linear(x, *rest) for rest in zip(weights, a, b, biases, scales, strict=True)]
    upstream = [torch.randn_like(y) for y in separate]
    inputs = [x, *a, *b]
    for got, want in zip(
        (*packed, *torch.autograd.grad(packed, inputs, upstream)),
        (*separate, *torch.autograd.grad(separate, inputs, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": torch.zeros(3, 31)}, r"x must be \[..., K\] for a weight \[N, K\] .*, got \[3, 31\] and \[48, 32\]"),
    "no features": (
        {"x": torch.zeros(3, 0), "weight": torch.zeros(48, 0), "lora_a": torch.zeros(4, 0)},
        r"with elements, got \[3, 0\] and \[48, 0\]",
    ),
    "scalar": ({"x": torch.zeros(())}, r"x must be \[..., K\]"),
    "a": ({"lora_a": torch.zeros(4, 31)}, r"lora_a must be \[r, 32\] with r of 1 or more, got \[4, 31\]"),
    "rank 0": ({"lora_a": torch.zeros(0, 32), "lora_b": torch.zeros(48, 0)}, r"r of 1 or more, got \[0, 32\]"),
    "b": ({"lora_b": torch.zeros(4, 48)}, r"lora_b must be \[48, 4\], got \[4, 48\]"),
    "bias": ({"bias": torch.zeros(1)}, r"bias must be \[48\], got \[1\]"),
    "dtype": ({"weight": torch.zeros(48, 32).half()}, "weight must be of x's dtype torch.float32, got torch.float16"),
    "integers": (
        {"x": torch.zeros(3, 32, dtype=torch.int64)},
        "x must be float32, float16, bfloat16 or float64, got torch.int64",
    ),
    "8 bits": (
        {"lora_a": torch.zeros(4, 32).to(torch.float8_e4m3fn)},
        "lora_a must be float32, .*, got torch.float8_e4m",
    ),
    "complex": ({"weight": torch.zeros(48, 32) * 1j}, "weight must be float32, .*, got torch.complex64"),
    "tensor scale": ({"scale": torch.ones(())}, "scale must be a number, got a tensor: multiply lora_b by it"),
    "device": ({"lora_b": torch.zeros(48, 4, device="meta")}, "lora_b must be on x's device cpu, got meta"),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lora_linear.lora_linear(**{**operands(3), **change})


def test_packed_layers_that_do_not_fit_are_refused() -> None:
    t = operands(3)
    with pytest.raises(ValueError, match="must be of one length, got 1, 2 and 2"):
        lora_linear_packed(t["x"], t["weight"], [t["lora_a"]], [t["lora_b"]] * 2)
    with pytest.raises(ValueError, match=r"each B must be \[N, r\] for its A \[r, K\], got \[48, 4\] and \[3, 32\]"):
        lora_linear_packed(t["x"], t["weight"], [t["lora_a"][:3]], [t["lora_b"]])
    layers = [t["lora_a"]] * 2, [t["lora_b"][:16], t["lora_b"][16:]]
    with pytest.raises(ValueError, match=r"weight must have \[16, 32\] features as the B, got \[32, 16\]"):
        lora_linear_packed(t["x"], [t["weight"][:32], t["weight"][32:]], *layers)
    with pytest.raises(ValueError, match=r"bias must have \[16, 32\] features as the B, got \[48\]"):
        lora_linear_packed(t["x"], t["weight"], *layers, [t["bias"]])


def path_of(rows: int, n: int, k: int, rank: int = 16, dtype: torch.dtype = torch.bfloat16) -> str:
    return choose_path(rows, n, k, rank, dtype, torch.device("cuda:0"))


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.delenv(PATH_VARIABLE, raising=False)


@pytest.mark.usefixtures("_hopper")
def test_the_table_decides_and_what_it_does_not_know_takes_addmm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert path_of(65536, 320, 320) == path_of(4096, 640, 640, rank=128, dtype=torch.float16) == "split"
    cases = {
        "few rows": (4095, 320, 320),
        "wide": (4096, 1280, 1280),
        "text": (65536, 320, 768),
        "unknown shape": (65536, 336, 336),
        "unaligned": (65536, 320, 324),
        "rank": (65536, 320, 320, 129),
        "float32": (65536, 320, 320, 16, torch.float32),
    }
    assert {name: path_of(*case) for name, case in cases.items()} == dict.fromkeys(cases, "addmm")
    assert choose_path(65536, 320, 320, 16, torch.bfloat16, torch.device("cpu")) == "addmm"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    assert path_of(65536, 320, 320) == "addmm"


@pytest.mark.usefixtures("_hopper")
def test_a_path_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    assert path_of(65536, 320, 320) == "addmm"
    monkeypatch.setenv(PATH_VARIABLE, "split")
    assert path_of(1, 1280, 336) == "split"
    assert path_of(65536, 320, 324) == path_of(65536, 320, 320, 129) == "addmm"  # no kernel there
    monkeypatch.setenv(PATH_VARIABLE, "fused")
    with pytest.raises(ValueError, match=r"D2F_FAST_LORA_PATH must be one of \('split', 'addmm'\), got 'fused'"):
        path_of(1, 320, 320)


def test_the_table_knows_every_lora_layer_of_stable_diffusion() -> None:
    widths = {"SD1.5": ((320, 640, 1280), 768), "SD2.1": ((320, 640, 1280), 1024), "SDXL": ((640, 1280), 2048)}
    for sizes, text in widths.values():
        for c in sizes:
            for shape in ((c, c), (3 * c, c), (8 * c, c), (c, 4 * c), (c, text)):
                assert {(cc, *shape, r) for cc in (80, 86, 89, 90, 120) for r in (16, 32, 64, 128)} <= TABLE.keys()
    # conv_shortcut of the down blocks, then of the up blocks, whose input has the skip connection's channels too.
    shortcuts = [(640, 320), (1280, 640), (1280, 2560), (1280, 1920), (640, 1920), (640, 1280), (640, 960)]
    for shape in (*shortcuts, (320, 960), (320, 640)):
        assert {(cc, *shape, r) for cc in (80, 86, 89, 90, 120) for r in (16, 32, 64, 128)} <= TABLE.keys()
    assert len(TABLE) == len(lora_dispatch.CAPABILITIES) * 4 * len({key[1:3] for key in TABLE})


WIDE_ROW = {
    "n": 320,
    "k": 336,
    "rank": 32,
    "path": "split",
    "forward": [64, 64, 32, 4, 3],
    "grad_x": [32, 16, 16, 4, 1],
}
NARROW_ROW = {"rank": 64, "shrink": [64, 64, 64, 4, 4], "rows_sum": [128, 64, 64, 4, 3], "grad_b": None}


def test_a_measured_table_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    assert lora_dispatch.read_measured(path) == ({}, {})
    path.write_text(json.dumps({"90": {"device": "H100", "wide": [{**WIDE_ROW, "us": 3}], "narrow": [NARROW_ROW]}}))
    wide, narrow = lora_dispatch.read_measured(path)
    assert wide == {(90, 320, 336, 32): ("split", Tile(64, 64, 32, 4, 3), Tile(32, 16, 16, 4, 1))}
    assert narrow == {(90, 64): (Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), None)}


@pytest.mark.usefixtures("_hopper")
def test_a_measured_table_beside_the_module_stands_in_place_of_its_own(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "dispatch", shutil.copy(lora_dispatch.__file__, tmp_path / "dispatch.py")
    )
    assert spec is not None and spec.loader is not None
    own, measured = (importlib.util.module_from_spec(spec) for _ in range(2))
    spec.loader.exec_module(own)
    wide = [{**WIDE_ROW, "n": 1280, "k": 1280}, {**WIDE_ROW, "n": 320, "k": 320, "path": "addmm"}]
    (tmp_path / "lora_measured.json").write_text(json.dumps({"90": {"wide": wide, "narrow": [NARROW_ROW]}}))
    spec.loader.exec_module(measured)
    kind = (torch.bfloat16, torch.device("cuda:0"))
    for module, paths in ((own, ["addmm", "split", "split"]), (measured, ["split", "addmm", "split"])):
        shapes = ((1280, 1280, 32), (320, 320, 32), (320, 320, 16))
        assert [module.choose_path(65536, *shape, *kind) for shape in shapes] == paths
    assert measured.entry_of(1280, 1280, 32, *kind)[1:] == (Tile(64, 64, 32, 4, 3), Tile(32, 16, 16, 4, 1))
    narrow = (Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), None)
    assert measured.narrow_entry_of(64, *kind) == narrow != own.narrow_entry_of(64, *kind)


CORRUPT: dict[str, tuple[Any, str]] = {
    "cut": ('{"90": {"wide": [', "measured.json is no entry of the LoRA kernels"),
    "list": ("[]", "measured.json is no entry"),
    "capability": ({"wide": [WIDE_ROW], "narrow": []}, "measured.json is no entry"),
    "no rows": ({"90": {"wide": []}}, r"measured.json is no entry of the LoRA kernels \('narrow'\)"),
    "path": ({"90": {"wide": [{**WIDE_ROW, "path": "fused"}]}}, "sm_90, .*'fused'.*no such path"),
    "features": ({"90": {"wide": [{**WIDE_ROW, "k": 24}]}}, "features that are no multiples of 16"),
    "boolean": ({"90": {"wide": [{**WIDE_ROW, "n": True}]}}, "n must be a positive integer, got True"),
    "bucket": (
        {"90": {"wide": [], "narrow": [{**NARROW_ROW, "rank": 48}]}},
        "sm_90, .*'rank': 48.*no bucket of ranks",
    ),
    "tile": ({"90": {"wide": [{**WIDE_ROW, "forward": [64, 64]}]}}, "benchmarks/tune_lora.py, or remove it"),
    "block": (
        {"90": {"wide": [{**WIDE_ROW, "grad_x": [64, 48, 32, 4, 3]}]}},
        r"grad_x must be \[m, n, k, warps, stages\], powers of two, blocks from 16 on, got \[64, 48, 32, 4, 3\]",
    ),
    "stages": ({"90": {"wide": [{**WIDE_ROW, "forward": [64, 64, 32, 4, 9]}]}}, "1 to 8 stages, got"),
    "missing": ({"90": {"wide": [{"n": 320}]}}, r"\('k'\): write the file anew with benchmarks/tune_lora.py"),
}


@pytest.mark.parametrize(("content", "sentence"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_measured_table_is_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        lora_dispatch.read_measured(path)


def compiled_kernels(*arguments: str) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot_lora_linear.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [("90,120", "16,128"), pytest.param(("80,86,89,90,120", "16,32,48,64,128"), marks=pytest.mark.slow)],
    ids=["two cards", "every entry"],
)
def test_every_entry_compiles_to_what_the_card_can_run(arguments: tuple[str, str]) -> None:
    reports = compiled_kernels(*arguments)
    seen = {(name.split()[0], name.split()[1]) for name in reports}
    kernels = ("narrow", "wide", "rows_sum", "grad_b")
    assert seen == set(itertools.product((f"sm_{cc}" for cc in arguments[0].split(",")), kernels))
    faults = {}
    for name, report in reports.items():
        good = report["spills"] == report["stack"] == 0 and report["shared"] <= report["shared_limit"]
        good &= report["wide_loads"] > 0 and report["wide_stores"] > 0
        if name.startswith("sm_90"):
            good &= report["wgmma"] == report["wgmma_bf16"] > 0  # bf16 and not tf32
        else:
            good &= report["mma"] > 0
        if not good:
            faults[name] = report
    assert not faults
