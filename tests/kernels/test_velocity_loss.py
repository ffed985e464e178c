"""The loss kernels in Triton's interpreter against float64 numpy; the op eager, compiled, traced and on a GPU.

The oracle goes from the output through x̂0 and ε̂ to the velocity, never through P, Q or a model target.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2f_fast.alignment import Alignment, NaiveFlow
from d2f_fast.kernels.align import align_launch
from d2f_fast.kernels.runtime import INTERPRET
from d2f_fast.kernels.velocity_loss import _VelocityLoss, velocity_loss_launch, velocity_loss_reference
from d2f_fast.ops import align, aligned_loss

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
WEIGHTINGS = ("flow", "native", "min_snr")
CASES = [(p, w) for p in PREDICTION_TYPES for w in WEIGHTINGS if (p, w) != ("flow_prediction", "min_snr")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One element, less than a block, a block exactly, several blocks and a part.
SHAPES = [(5, 1, 1, 1), (1, 1, 7, 9), (3, 4, 16, 32), (2, 4, 33, 35)]


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch):
    """`torch.empty` is full of NaN: an element that no program writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def model_of(prediction_type):
    if prediction_type == "flow_prediction":
        return NaiveFlow()
    return Alignment.from_scheduler(DDIMScheduler(**SD, prediction_type=prediction_type))


def settings(prediction_type, weighting="flow"):
    model = model_of(prediction_type)
    return prediction_type, model.t_min, model.t_max, weighting, 5.0


def to_kernel(x):
    """x where the kernel runs: here in Triton's interpreter, on the GPU if there is one, in the same memory layout."""
    if not isinstance(x, torch.Tensor) or INTERPRET:
        return x
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())


def launch(*operands):
    """The outputs of `velocity_loss_launch`, on the CPU."""
    return [x.cpu() for x in velocity_loss_launch(*map(to_kernel, operands))]


def inside_nan(x):
    """x in memory of the same strides, with NaN (or True) on both sides of it."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    buffer = torch.full((extent + 64,), torch.nan if x.dtype.is_floating_point else True, dtype=x.dtype)
    return buffer.as_strided(x.shape, x.stride(), 32).copy_(x)


def operands(shape, dtype=torch.float32):
    output, latents, noise = torch.randn(3, *shape).to(dtype)
    t = torch.rand(shape[0])
    ends = torch.tensor([0.0, 1.0, 0.03])[: len(t) - 1]
    t[: len(ends)] = ends
    return output, latents, noise, t


def masks(shape):
    batch, channels, height, width = shape
    soft = torch.rand(batch, 1, height, width) * 0.01
    soft[-1] = 0  # an empty one
    return {
        "none": None,
        "bool": torch.rand(batch, 1, height, width) > 0.4,
        "soft, one empty": soft,
        "per channel": torch.rand(1, channels, 1, 1),
        "float64": torch.rand(1, 1, height, width, dtype=torch.float64),
    }


def truth(output, latents, noise, t, mask, prediction_type, t_min, t_max, weighting, gamma):
    """Loss per sample and the gradient of each with respect to the output, in float64."""
    output, latents, noise, t = (x.double().numpy() for x in (output, latents, noise, t))
    t = t.reshape(-1, 1, 1, 1)
    n, read_at = np.hypot(t, 1 - t), np.clip(t, t_min, t_max)
    alpha, sigma = read_at / np.hypot(read_at, 1 - read_at), (1 - read_at) / np.hypot(read_at, 1 - read_at)
    x_t = t * latents + (1 - t) * noise

    def velocity(output, x_t):
        sample = x_t / n
        if prediction_type == "flow_prediction":
            return -output
        if prediction_type == "epsilon":
            x0, eps = (sample - sigma * output) / alpha, output
        elif prediction_type == "v_prediction":
            x0, eps = alpha * sample - sigma * output, sigma * sample + alpha * output
        else:
            x0, eps = output, (sample - alpha * output) / sigma
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(t < t_min, (x0 - x_t) / (1 - t), np.where(t > t_max, (x_t - eps) / t, x0 - eps))

    error = velocity(output, x_t) - (latents - noise)
    slope = velocity(np.ones_like(output), 0 * x_t)
    factor = {"flow": 1.0, "native": slope**-2, "min_snr": 0.0}[weighting]
    if weighting == "min_snr":
        factor = np.minimum((alpha / sigma) ** 2, gamma) / (alpha / sigma) ** 2
    weights = np.ones_like(error) if mask is None else np.broadcast_to(mask.double().numpy(), error.shape)
    total = weights.sum((1, 2, 3), keepdims=True)
    weights = factor * weights / np.where(total == 0, 1, total)
    return (weights * error**2).sum((1, 2, 3)), 2 * weights * error * slope


def rms(x):
    return np.sqrt(np.square(x).mean())


def amplification(t, prediction_type, t_min, t_max):
    """How much larger than the error what is subtracted may be, per sample: ε is divided by alpha, x0 by sigma."""
    read_at = t.double().numpy().clip(t_min, t_max)
    n = np.hypot(read_at, 1 - read_at)
    divisor = {"epsilon": read_at, "sample": 1 - read_at}.get(prediction_type, n)
    return n / divisor


def assert_right(got, output, latents, noise, t, mask, *options):
    """Loss and gradient of each sample against float64, and the gradient rounded to the output's type once."""
    loss, error, slope = got
    assert loss.dtype == error.dtype == slope.dtype == torch.float32
    assert loss.shape == slope.shape == t.shape and error.shape == output.shape
    exact, exact_gradient = truth(output, latents, noise, t, mask, *options)
    # With the output's sign turned, what cancels adds up: the size of what was rounded.
    opposite, opposite_gradient = truth(-output, latents, noise, t, mask, *options)
    bounds = 1e-6 * amplification(t, *options[:3])
    gradient = slope.reshape(-1, 1, 1, 1) * error
    plain = output.clone().requires_grad_()
    plain_loss, *_ = velocity_loss_reference(plain, latents, noise, t, mask, *options)
    (plain_gradient,) = torch.autograd.grad(plain_loss.sum(), plain)
    ours, theirs = (np.abs(x.detach().double().numpy() - exact) for x in (loss, plain_loss))
    assert (ours <= theirs + bounds * (exact + opposite)).all()
    for b, bound in enumerate(bounds):
        rounded = bound * (rms(exact_gradient[b]) + rms(opposite_gradient[b]))
        assert rms(gradient[b].double().numpy() - exact_gradient[b]) <= 4 * rounded
        low = [x[b].to(output.dtype).double().numpy() - exact_gradient[b] for x in (gradient, plain_gradient)]
        assert rms(low[0]) <= 1.01 * rms(low[1]) + rounded


@pytest.mark.parametrize(("prediction_type", "weighting"), CASES)
def test_the_kernels_give_loss_and_gradient_of_every_prediction_and_weighting(prediction_type, weighting):
    options = settings(prediction_type, weighting)
    for shape in SHAPES[1:3]:
        arguments = operands(shape)
        for mask in list(masks(shape).values())[:3]:
            given = [None if x is None else inside_nan(x) for x in (*arguments, mask)]
            assert_right(launch(*given, *options, True), *arguments, mask, *options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_serve_every_shape_type_and_mask(dtype):
    options = settings("v_prediction")
    for shape in SHAPES:
        arguments = operands(shape, dtype)
        for mask in masks(shape).values():
            given = [None if x is None else inside_nan(x) for x in (*arguments, mask)]
            assert_right(launch(*given, *options, True), *arguments, mask, *options)


def test_operands_of_different_types_meet_in_float32():
    options = settings("epsilon")
    for dtypes in ((torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.bfloat16, torch.bfloat16)):
        *tensors, t = operands((2, 4, 9, 9))
        arguments = (*(x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)), t)
        assert_right(launch(*arguments, None, *options, True), *arguments, None, *options)


def layouts():
    """Operands of every layout a caller may have: [4, 3, 8, 9] each."""
    dense = torch.randn(4, 3, 8, 9)
    return {
        "contiguous": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "every second": torch.randn(8, 3, 8, 9)[::2],
        "cropped": torch.randn(4, 3, 10, 12)[..., 1:9, 2:11],
        "transposed": torch.randn(4, 3, 9, 8).transpose(2, 3),
        "expanded": torch.randn(1, 3, 8, 9).expand(4, 3, 8, 9),
    }


@pytest.mark.parametrize("other_layout", layouts())
@pytest.mark.parametrize("output_layout", layouts())
def test_the_kernels_pair_the_same_elements_in_every_layout(output_layout, other_layout):
    options, output = settings("v_prediction"), layouts()[output_layout]
    latents, noise = layouts()[other_layout], layouts()["transposed"]
    t, mask = torch.rand(8)[::2], torch.rand(4, 9, 1, 8).permute(0, 2, 3, 1) > 0.3
    for arguments in ((output, latents, noise, t, mask), (output, noise, latents, t, None)):
        got = launch(*arguments, *options, True)
        assert_right(got, *arguments, *options)
        wanted = torch.channels_last if output_layout == "channels_last" else torch.contiguous_format
        assert got[1].is_contiguous(memory_format=wanted)


def test_offsets_beyond_32_bits_are_right():
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GB, of which a few pages are ever touched
    output = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 1, 4, 4), (2**30, 16, 4, 1))
    output.copy_(torch.randn(3, 1, 4, 4))
    arguments, options = (
        (output, output.flip(0), output.flip(1), torch.tensor([0.2, 0.5, 0.9]), None),
        settings("sample"),
    )
    assert_right(launch(*arguments, *options, True), *arguments, *options)


def test_partial_sums_of_many_blocks_are_added_up(monkeypatch):
    monkeypatch.setattr(sys.modules["d2f_fast.kernels.velocity_loss"], "SUM_BLOCK", 4)
    shape, options = (2, 4, 75, 75), settings("epsilon", "min_snr")  # 11 blocks: three rounds of the sum
    arguments = operands(shape)
    for mask in (None, torch.rand(2, 1, 75, 75)):
        assert_right(launch(*arguments, mask, *options, True), *arguments, mask, *options)


def test_times_outside_the_unit_interval_and_nan_go_on_as_in_plain_torch():
    for prediction_type, weighting in CASES:
        output, latents, noise, _ = operands((3, 4, 5, 5))
        arguments = (output, latents, noise, torch.tensor([-0.25, 1.25, torch.nan]), None)
        options = settings(prediction_type, weighting)
        got, expected = launch(*arguments, *options, True), velocity_loss_reference(*arguments, *options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_an_empty_batch_gives_an_empty_loss():
    output, t = torch.zeros(0, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(0)
    for function in (launch, torch.ops.d2f_fast.velocity_loss):
        for mask in (None, torch.ones(1, 1, 8, 8)):
            loss, error, slope = function(output, output, output, t, mask, *settings("epsilon"), True)
            assert loss.shape == slope.shape == (0,) and error.shape == output.shape


def test_the_kernels_give_the_same_bits_every_time():
    arguments, options = operands((3, 4, 33, 35)), settings("epsilon", "min_snr")
    mask = torch.rand(3, 1, 33, 35)
    runs = [launch(*arguments, mask, *options, True) for _ in range(3)]
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(run, runs[0], strict=True))
    without = launch(*arguments, mask, *options, False)
    assert torch.equal(without[0], runs[0][0]) and without[1].shape == (0,)


@pytest.mark.skipif(not INTERPRET, reason="launches are counted in Triton's interpreter")
def test_an_objective_call_is_three_launches(monkeypatch):
    from triton.runtime.interpreter import GridExecutor  # here: triton is optional

    launched, call = [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(self) or call(self, *a, **k))
    output, latents, noise, t = operands((2, 4, 9, 9))
    model = model_of("epsilon")
    align_launch(latents, noise, t, model.rising_flow_times(t.dtype), model.t_min, 1000)
    launch(output, latents, noise, t, torch.rand(2, 1, 9, 9), *settings("epsilon"), True)
    assert len(launched) == 3


@pytest.mark.parametrize("masked", [False, True])
def test_the_op_is_well_formed(masked):
    for dtype, layout in ((torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format)):
        output, latents, noise, t = operands((2, 4, 6, 6), dtype)
        output = output.contiguous(memory_format=layout)
        mask = torch.rand(2, 1, 6, 6) > 0.5 if masked else None
        arguments = (output, latents, noise, t, mask, *settings("epsilon", "min_snr"), True)
        torch.library.opcheck(torch.ops.d2f_fast.velocity_loss.default, arguments)


@pytest.fixture
def served(monkeypatch):
    """The ops serve CPU tensors too, in float64 as well: by their CPU implementation, plain torch."""
    for name in ("align", "velocity_loss"):
        monkeypatch.setattr(sys.modules[f"d2f_fast.kernels.{name}"], "serves", lambda *_: True)


@pytest.mark.parametrize(("prediction_type", "weighting"), CASES)
def test_the_gradient_is_that_of_finite_differences_and_of_plain_torch(served, prediction_type, weighting):
    output, latents, noise, t = (x.double() for x in operands((3, 1, 3, 3)))
    for mask in (None, torch.rand(3, 1, 3, 1, dtype=torch.float64)):

        def loss(output, latents=latents, mask=mask):
            return aligned_loss(
                output, latents, noise, t, model_of(prediction_type), weighting, mask=mask, reduction="none"
            )

        output = output.detach().requires_grad_()
        assert torch.autograd.gradcheck(loss, (output,))
        upstream = torch.rand(3, dtype=torch.float64)
        (got,) = torch.autograd.grad(loss(output), output, upstream)
        plain = loss(output, latents.clone().requires_grad_())  # a gradient that the op does not have
        (expected,) = torch.autograd.grad(plain, output, upstream)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_the_gradient_has_the_type_and_layout_of_the_output_and_does_not_underflow(served):
    output, latents, noise, t = operands((2, 4, 64, 64), torch.float16)
    output = output.contiguous(memory_format=torch.channels_last).requires_grad_()
    # 2 * error / 16384 alone would be subnormal in float16; gradient scaling must bring it back.
    loss = aligned_loss(output, latents, noise, t, model_of("v_prediction"))
    (gradient,) = torch.autograd.grad(loss * 2.0**14, output)
    exact = truth(output.detach(), latents, noise, t, None, *settings("v_prediction"))[1] * 2.0**14 / 2
    assert gradient.dtype == torch.float16 and gradient.stride() == output.stride()
    assert (np.abs(gradient.double().numpy() - exact) <= 2.0**-11 * 1.01 * np.abs(exact) + 2.0**-24).all()


def test_a_second_derivative_is_refused_where_the_op_serves(served):
    output, latents, noise, t = operands((2, 1, 3, 3))
    output.requires_grad_()
    loss = aligned_loss(output, latents, noise, t, model_of("epsilon"))
    with pytest.raises(RuntimeError, match="aligned_loss can be differentiated once, got create_graph=True"):
        torch.autograd.grad(loss, output, create_graph=True)


def step(network, latents, noise, t, model, weighting, mask):
    sample, timestep = align(latents, noise, t, model)
    output = network(sample) + 0.1 * (timestep / 100).sin()[:, None, None, None]
    return aligned_loss(output, latents, noise, t, model, weighting, mask=mask)


@pytest.mark.parametrize(("backend", "fused"), [("aot_eager", True), ("inductor", True), ("inductor", False)])
def test_a_compiled_step_is_one_graph_for_every_time_and_agrees_with_eager(backend, fused, request):
    if fused:
        request.getfixturevalue("served")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    model, network = model_of("epsilon"), torch.nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    for seed in range(10):
        latents, noise, _, t = operands((4, 4, 8, 8))
        mask, results = torch.rand(4, 1, 8, 8) > 0.3, []
        for function in (compiled, step):
            network.zero_grad()
            loss = function(network, latents, noise, t.clamp(seed * 0.05, 1 - seed * 0.03), model, "flow", mask)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in network.parameters())])
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert counter.frame_count == 1
    assert any("d2f_fast" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes) == fused


class Recorder(TorchDispatchMode):
    """The operands of every call of an alignment op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "d2f_fast":
            self.calls.append(args)
        return function(*args, **(kwargs or {}))


def test_the_op_serves_gpus_and_plain_torch_the_rest(monkeypatch):
    model, op = model_of("epsilon"), torch.ops.d2f_fast.velocity_loss
    # Torch without CUDA aborts at an autograd node of a GPU that pretends to be there.
    monkeypatch.setattr(_VelocityLoss, "apply", torch.no_grad()(lambda *operands: op(*operands, True)[0]))
    module = sys.modules["d2f_fast.kernels.velocity_loss"]
    monkeypatch.setattr(module, "velocity_loss_reference", torch.no_grad()(velocity_loss_reference))
    with FakeTensorMode():
        output = torch.empty(2, 4, 8, 8, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
        latents, t = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(2, device="cuda")
        mask = torch.empty(2, 1, 8, 8, device="cuda")

        def fused(output, latents, t, mask=None):
            """Whether the op was called, and whether for the gradient too."""
            with Recorder() as recorder:
                loss = aligned_loss(output, latents, latents, t, model, mask=mask)
            assert loss.shape == () and loss.is_floating_point() and loss.device == t.device
            return [arguments[-1] for arguments in recorder.calls]

        wanted = output.clone().requires_grad_()
        assert fused(output, latents, t, mask) == [False] and fused(wanted, latents, t, mask) == [True]
        with torch.no_grad():
            assert fused(wanted, latents, t) == [False]
        assert not fused(wanted, latents, t.double())
        assert not fused(wanted, latents.double(), t) and not fused(output.double(), latents, t)
        assert not fused(wanted, latents.clone().requires_grad_(), t)
        assert not fused(wanted, latents, t, mask.clone().requires_grad_())
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert not fused(output, latents, t)


@pytest.fixture(scope="module")
def compiled():
    """What Triton makes of the kernels for GPUs that are not here; `aot_velocity_loss.py` says which cases."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_velocity_loss.py")
    environment["PYTHONPATH"] = str(script.parents[2])
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_gpu_runs_them_without_spills_and_with_16_byte_access(compiled):
    assert {case.split()[0] for case in compiled} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120"}
    for case, found in compiled.items():
        assert found["spills"] == found["stack"] == 0 and found["registers"] <= 64, case
        if case.endswith("sum"):
            continue
        # Three operands, of which two may lie across; 32-bit elements take two accesses each, and so does the error.
        loads = 1 if "channels_last" in case else 6 if "fp32" in case else 3
        assert (found["wide_loads"], found["wide_stores"]) == (loads, 2), case


@pytest.mark.gpu
@pytest.mark.parametrize(("prediction_type", "weighting"), CASES)
def test_on_a_gpu_a_batch_of_latents_has_the_exact_loss_and_gradient(prediction_type, weighting):
    model = model_of(prediction_type)
    output, latents, noise, t = operands((16, 4, 64, 64), torch.bfloat16)
    for mask in (None, torch.rand(16, 1, 64, 64) > 0.3):
        exact, exact_gradient = truth(output, latents, noise, t, mask, *settings(prediction_type, weighting))
        wanted = output.cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
        arguments = (wanted, *(x.cuda() for x in (latents, noise, t)), model, weighting)
        options = {"mask": None if mask is None else mask.cuda(), "reduction": "none"}
        loss = aligned_loss(*arguments, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), wanted)
        assert gradient.dtype == torch.bfloat16 and gradient.stride() == wanted.stride()
        bounds = 2e-6 * amplification(t, *settings(prediction_type)[:3])
        assert (np.abs(loss.detach().cpu().double().numpy() - exact) <= bounds * exact).all()
        # One rounding to bfloat16, of what carries the rounding of the coefficients.
        within = (2.0**-8 + bounds.reshape(-1, 1, 1, 1)) * np.abs(exact_gradient)
        within += bounds.reshape(-1, 1, 1, 1) * np.abs(exact_gradient).max((1, 2, 3), keepdims=True)
        assert (np.abs(gradient.cpu().double().numpy() - exact_gradient) <= within).all()
        for _ in range(100):
            again = aligned_loss(*arguments, **options)
            assert torch.equal(again, loss) and torch.equal(torch.autograd.grad(again.sum(), wanted)[0], gradient)


@pytest.mark.gpu
def test_on_a_gpu_it_never_waits_and_a_graph_replays_the_same_bits():
    model = model_of("epsilon")
    output, latents, noise, t = (x.cuda() for x in operands((16, 4, 64, 64), torch.bfloat16))
    output = output.contiguous(memory_format=torch.channels_last).requires_grad_()
    mask = torch.rand(16, 1, 64, 64, device="cuda") > 0.3

    def run():
        loss = aligned_loss(output, latents, noise, t, model, mask=mask)
        return loss.detach(), torch.autograd.grad(loss, output)[0]

    eager = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))
