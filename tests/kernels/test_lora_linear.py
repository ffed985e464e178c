"""The LoRA linear against plain torch on both of its paths: results, gradients, saved tensors, compilation, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from d2f_fast.kernels import lora_linear
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.kernels.lora_linear import lora_linear_packed, lora_linear_reference

NAMES = ("x", "lora_a", "lora_b")


def operands(
    *leading: int, n: int = 48, k: int = 32, rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return operands of lora_linear; x, A and B require gradients; A and B are float32, or float64 where x is."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(*leading, k).to(dtype).requires_grad_(),
        "weight": torch.randn(n, k).to(dtype) / k**0.5,
        "lora_a": torch.randn(rank, k, dtype=master).requires_grad_(),
        "lora_b": torch.randn(n, rank, dtype=master).requires_grad_(),
        "bias": torch.randn(n).to(dtype),
    }


def results(function: Callable[..., Tensor], t: dict[str, Any], seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Return output and gradients by name, for a fixed random upstream gradient."""
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
        # A scale of 1 changes no bit; a single row is a matrix times a vector, which is summed in another order.
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


def test_zero_adapter_gives_the_base_linear(path: str) -> None:
    t = operands(70)
    t["lora_b"] = torch.zeros_like(t["lora_b"], requires_grad=True)
    with torch.no_grad():
        assert torch.equal(lora_linear.lora_linear(**t), F.linear(t["x"], t["weight"], t["bias"]))


def test_output_is_linear_in_x(path: str) -> None:
    t = {**operands(9), "bias": None}
    double = lora_linear.lora_linear(**{**t, "x": 2 * t["x"]})
    torch.testing.assert_close(double, 2 * lora_linear.lora_linear(**t), rtol=0, atol=0)


def test_any_strides_of_x_give_the_same_results_and_x_is_unchanged(path: str) -> None:
    base = torch.randn(32, 6, 5)
    x = base.permute(1, 2, 0).requires_grad_()
    t, version = operands(6, 5), base._version
    got = results(lora_linear.lora_linear, {**t, "x": x})
    want = results(lora_linear.lora_linear, {**t, "x": x.detach().contiguous().requires_grad_()})
    assert base._version == version
    for name in want:
        # Another layout has another order of sums: at worst eps * K * |x| |w|, with K = 32 and values up to 10.
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
def test_only_needed_gradients_are_computed_and_only_their_inputs_kept(path: str, wanted: set[str]) -> None:
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


def test_only_x_and_s_are_kept_for_backward(path: str) -> None:
    t, kept = operands(2, 25), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), id):
        lora_linear.lora_linear(**t)
    known = {tensor.data_ptr() for tensor in t.values()}
    assert {tuple(tensor.shape) for key, tensor in kept.items() if key not in known} == {(50, 4)}
    assert t["x"].data_ptr() in kept


def test_second_derivative_is_refused(path: str) -> None:
    t = operands(5)
    (grad,) = torch.autograd.grad(lora_linear.lora_linear(**t).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_non_contiguous_operands_give_the_same_results(path: str, name: str) -> None:
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


def test_ops_pass_opcheck() -> None:
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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_once_and_without_a_graph_break(path: str, backend: str) -> None:
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
        got = results(lora_linear.lora_linear, t)  # backward runs inside too, and must not round float32 tensors
    cast = {n: v if n.startswith("lora") else v.detach().bfloat16().requires_grad_(n == "x") for n, v in t.items()}
    want = results(lora_linear.lora_linear, cast)
    assert got["y"].dtype == torch.bfloat16 and got["x"].dtype == torch.float32
    for name in want:
        assert torch.equal(got[name], want[name].to(got[name].dtype)), name


def test_exported_graphs_hold_plain_torch(path: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor) -> Tensor:
            return lora_linear.lora_linear(x, weight, lora_a, lora_b, bias, 0.5)

    t = {name: tensor.detach() for name, tensor in operands(5).items()}
    program = torch.export.export(Layer(), (), t)
    assert not [node for node in program.graph.nodes if "d2f_fast" in str(node.target)]
    assert torch.equal(program.module()(**t), lora_linear_reference(**t, scale=0.5))


@pytest.mark.parametrize("joined", [True, False], ids=["one weight", "several weights"])
def test_packed_layers_give_the_results_of_separate_layers(path: str, joined: bool) -> None:
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
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lora_linear.lora_linear(**{**operands(3), **change})


def test_packed_layers_that_do_not_fit_are_refused() -> None:
    t = operands(3)
    with pytest.raises(ValueError, match="must be of one length, got 1, 2 and 2"):
        lora_linear_packed(t["x"], t["weight"], [t["lora_a"]], [t["lora_b"]] * 2)
    with pytest.raises(ValueError, match=r"each B must be \[N, r\] for its A \[r, K\], got \[48, 4\] and \[3, 32\]"):
        lora_linear_packed(t["x"], t["weight"], [t["lora_a"][:3]], [t["lora_b"]])
    layers = [t["lora_a"]] * 2, [t["lora_b"][:16], t["lora_b"][16:]]
    with pytest.raises(ValueError, match=r"weight must have \[16, 32\] features like the B, got \[32, 16\]"):
        lora_linear_packed(t["x"], [t["weight"][:32], t["weight"][32:]], *layers)
    with pytest.raises(ValueError, match=r"bias must have \[16, 32\] features like the B, got \[48\]"):
        lora_linear_packed(t["x"], t["weight"], *layers, [t["bias"]])
