"""The alignment kernel in Triton's interpreter against float64 numpy; the op eager, compiled, traced and on a GPU."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.kernels.align import align_launch, align_reference
from d2f_fast.kernels.runtime import INTERPRET
from d2f_fast.ops import align

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The samples have one element, less than a block, exactly a block, and several blocks and a part.
SHAPES = [(5, 1, 1, 1), (1, 1, 7, 9), (3, 4, 16, 32), (2, 4, 33, 35)]


def flow_of(prediction_type, zero_snr=False):
    if prediction_type == "flow_prediction":
        return NaiveFlow()
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    return Alignment.from_scheduler(scheduler)


def table_of(flow):
    return flow.rising_flow_times(torch.float32), flow.t_min, flow.num_train_timesteps


def to_kernel(x):
    """Return x on the device where the kernel runs, in the same memory layout: the CPU for Triton's interpreter."""
    if not isinstance(x, torch.Tensor) or INTERPRET:
        return x
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())


def launch(*operands):
    """Return the outputs of `align_launch`, on the CPU."""
    return [x.cpu() for x in align_launch(*map(to_kernel, operands))]


def inside_nan(x):
    """Return a copy of x with the same strides, in memory with NaN before and after it."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    buffer = torch.full((extent + 64,), torch.nan, dtype=x.dtype)
    return buffer.as_strided(x.shape, x.stride(), 32).copy_(x)


def operands(shape, dtype=torch.float32):
    latents, noise = torch.randn(2, *shape).to(dtype)
    t = torch.rand(shape[0])
    t[: min(3, len(t) - 1)] = torch.tensor([0.0, 1.0, 0.03])[: min(3, len(t) - 1)]
    return latents, noise, t


def truth(latents, noise, t, flow):
    """Return sample and timestep in float64, by numpy."""
    latents, noise, t = (x.double().numpy() for x in (latents, noise, t))
    if isinstance(flow, NaiveFlow):
        n, timestep = np.ones_like(t), 1000 * (1 - t)
    else:
        abar = flow.schedule.alphas_cumprod.numpy()
        r = np.sqrt(abar) / (np.sqrt(abar) + np.sqrt(1 - abar))
        n, timestep = np.hypot(t, 1 - t), np.interp(np.maximum(t, flow.t_min), r[::-1], np.arange(1000.0)[::-1])
    a, b = (x.reshape(-1, 1, 1, 1) for x in (t / n, (1 - t) / n))
    return a * latents + b * noise, timestep


def ulps(got, exact):
    """Return how many numbers of its type lie between each element and the correctly rounded one."""
    integer = {2: torch.int16, 4: torch.int32}[got.element_size()]
    # As integers the numbers of one sign are consecutive; negative ones descend from the smallest integer.
    order = [x.contiguous().view(integer).long() for x in (got, torch.from_numpy(exact).to(got.dtype))]
    return (order[0] - order[1]).abs()


def assert_right(got, latents, noise, t, flow):
    """Assert that the sample is the exact one rounded once, and the timestep that of plain torch in float32."""
    sample, timestep = got
    exact, exact_timestep = truth(latents, noise, t, flow)
    _, plain_timestep = align_reference(latents, noise, t, *table_of(flow))
    assert sample.dtype == latents.dtype and timestep.dtype == torch.float32
    assert sample.shape == latents.shape and timestep.shape == t.shape
    # In float32, n, the quotients, the products and the sum round at most 7 times on one path: 7 * 2**-24 of the terms,
    # which are at most the largest latent or noise. Where the sum cancels, this is many units in its last place.
    arithmetic = 7 * 2.0**-24 * sum(x.double().abs().max().item() for x in (latents, noise))
    near = np.abs(sample.double().numpy() - exact) <= arithmetic
    # Triton's interpreter truncates to bfloat16 where a GPU rounds, so the next number is allowed too.
    assert (torch.from_numpy(near) | (ulps(sample, exact) <= int(latents.dtype != torch.float32))).all()
    torch.testing.assert_close(timestep, plain_timestep, rtol=2e-7, atol=1e-4)
    np.testing.assert_allclose(timestep, exact_timestep, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_kernel_rounds_the_exact_sample_once_and_writes_every_element(prediction_type, dtype):
    flow = flow_of(prediction_type)
    for shape in SHAPES:
        latents, noise, t = operands(shape, dtype)
        got = launch(*map(inside_nan, (latents, noise, t)), *table_of(flow))
        assert_right(got, latents, noise, t, flow)


def layouts():
    """Return tensors [4, 3, 8, 9] in every layout that a caller's latents or noise may have."""
    dense = torch.randn(4, 3, 8, 9)
    last = dense.contiguous(memory_format=torch.channels_last)
    return {
        "contiguous": dense,
        "channels_last": last,
        "every second": torch.randn(8, 3, 8, 9)[::2],
        "cropped": torch.randn(4, 3, 10, 12)[..., 1:9, 2:11],
        "transposed": torch.randn(4, 3, 9, 8).transpose(2, 3),
        "expanded": torch.randn(1, 3, 8, 9).expand(4, 3, 8, 9),
        "one for all": torch.randn(1, 1, 1, 1).expand(4, 3, 8, 9),
    }


@pytest.mark.parametrize("noise_layout", layouts())
@pytest.mark.parametrize("latents_layout", layouts())
def test_kernel_pairs_the_same_elements_in_every_layout(latents_layout, noise_layout):
    latents, noise, flow = layouts()[latents_layout], layouts()[noise_layout], flow_of("v_prediction")
    t = torch.rand(8)[::2]
    got = launch(latents, noise, t, *table_of(flow))
    assert_right(got, latents, noise, t, flow)
    wanted = torch.channels_last if latents_layout == "channels_last" else torch.contiguous_format
    assert got[0].is_contiguous(memory_format=wanted)


def test_offsets_beyond_32_bits_are_right():
    torch.utils.deterministic.fill_uninitialized_memory = False  # of 4 GB, only a few pages are ever touched
    latents = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 1, 4, 4), (2**30, 16, 4, 1))
    noise, t, flow = latents.copy_(torch.randn(3, 1, 4, 4)).flip(0), torch.tensor([0.2, 0.5, 0.9]), flow_of("epsilon")
    assert_right(launch(latents, noise, t, *table_of(flow)), latents, noise, t, flow)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_timestep_equals_the_table_at_every_node_and_is_clamped_outside(zero_snr):
    flow = flow_of("v_prediction", zero_snr)
    nodes = flow.flow_time(torch.arange(0.0, 1000, 7))
    t = torch.cat([nodes, torch.tensor([-0.5, 0.0, 1.0, 1.5, torch.inf, -torch.inf, torch.nan])])
    latents = noise = torch.zeros(len(t), 1, 1, 1)
    _, timestep = launch(latents, noise, t, *table_of(flow))
    assert torch.equal(timestep[: len(nodes)], torch.arange(0.0, 1000, 7))
    assert timestep[len(nodes) :].tolist()[:6] == [999, 999, 0, 0, 0, 999]
    assert timestep[-1].isnan()


def test_times_outside_the_unit_interval_are_extrapolated_as_in_plain_torch():
    for flow in (flow_of("epsilon"), NaiveFlow()):
        latents, noise, _ = operands((3, 4, 5, 5))
        t = torch.tensor([-0.25, 1.25, torch.nan])
        for got, expected in zip(
            launch(latents, noise, t, *table_of(flow)),
            align_reference(latents, noise, t, *table_of(flow)),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_empty_batch_gives_empty_outputs():
    latents, t = torch.zeros(0, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(0)
    for function in (launch, torch.ops.d2f_fast.align):
        sample, timestep = function(latents, latents, t, *table_of(flow_of("epsilon")))
        assert sample.shape == latents.shape and sample.dtype == torch.bfloat16 and timestep.shape == (0,)


def test_samples_with_too_many_elements_are_refused():
    latents = torch.empty(1, dtype=torch.float32).expand(1, 2**11, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"a sample must have at most 2147418112 elements, got 2147483648"):
        launch(latents, latents, torch.zeros(1), *table_of(flow_of("epsilon")))


def test_kernel_gives_the_same_bits_every_time():
    latents, noise, t = operands((3, 4, 16, 33))
    runs = [launch(latents, noise, t, *table_of(flow_of("epsilon"))) for _ in range(3)]
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_op_passes_opcheck(prediction_type):
    for dtype, layout in ((torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format)):
        latents, noise, t = operands((2, 4, 6, 6), dtype)
        latents = latents.contiguous(memory_format=layout)
        arguments = (latents, noise, t, *table_of(flow_of(prediction_type)))
        torch.library.opcheck(torch.ops.d2f_fast.align.default, arguments)


def test_plain_torch_is_differentiable_in_every_operand():
    flow, t = flow_of("epsilon"), torch.tensor([0.3, 0.7], dtype=torch.float64)
    latents, noise, t = (x.double().requires_grad_() for x in (*torch.randn(2, 2, 1, 2, 2), t))
    assert torch.autograd.gradcheck(lambda *x: align(*x, flow), (latents, noise, t))


class Recorder(TorchDispatchMode):
    """Record the calls of the alignment ops."""

    def __init__(self):
        super().__init__()
        self.fused = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "d2f_fast":
            self.fused.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("serves", [False, True])
def test_op_runs_where_it_serves_and_no_gradient_is_wanted(monkeypatch, serves):
    asked, module = [], sys.modules["d2f_fast.kernels.align"]
    monkeypatch.setattr(module, "serves", lambda *operands: asked.append(operands) or serves)
    (latents, noise, t), flow = operands((2, 4, 8, 8)), flow_of("epsilon")

    def fused(*operands):
        with Recorder() as recorder:
            align(*operands, flow)
        assert asked.pop() == (operands[2], operands[0], operands[1])
        return bool(recorder.fused)

    assert fused(latents, noise, t) is serves
    for wanted in range(3):
        tensors = [latents, noise, t]
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        assert not fused(*tensors)
        with torch.no_grad():
            assert fused(*tensors) is serves


def test_exported_graph_holds_plain_torch():
    class Prologue(torch.nn.Module):
        def forward(self, latents, noise, t):
            return align(latents, noise, t, flow)

    flow, arguments = flow_of("epsilon"), operands((2, 4, 8, 8))
    exported = torch.export.export(Prologue(), arguments)
    assert not [node for node in exported.graph.nodes if "d2f_fast" in str(node.target)]
    for got, expected in zip(exported.module()(*arguments), align(*arguments, flow), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cards", ["90", pytest.param("80,86,89,90,120", marks=pytest.mark.slow)])
def test_kernel_compiles_without_spills_and_with_16_byte_access_for_every_gpu(cards, compile_ahead):
    compiled = compile_ahead("aot_align.py", cards)
    assert {case.split()[0] for case in compiled} == {f"sm_{card}" for card in cards.split(",")}
    for case, found in compiled.items():
        assert found["spills"] == found["stack"] == 0 and found["registers"] <= 64, case
        # There are two operands, one of which may be strided; 32-bit elements take two accesses each.
        loads, stores = (1, 1) if "strided" in case else (4, 2) if "fp32" in case else (2, 1)
        assert (found["wide_loads"], found["wide_stores"]) == (loads, stores), case


@pytest.mark.gpu
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_gpu_result_is_the_exact_one_rounded_once(prediction_type):
    flow = flow_of(prediction_type)
    latents, noise, t = operands((16, 4, 64, 64), torch.bfloat16)
    arguments = [x.cuda() for x in (latents, noise, t)]
    sample, timestep = align(*arguments, flow.to("cuda"))
    exact, exact_timestep = truth(latents, noise, t, flow)
    expected = torch.from_numpy(exact).bfloat16()
    # A float32 sum next to a tie may, rarely, round the other way.
    assert (sample.cpu() != expected).float().mean() < 1e-3
    assert np.abs(timestep.cpu() - exact_timestep).max() <= 1e-3
    for _ in range(100):
        again = align(*arguments, flow.to("cuda"))
        assert torch.equal(again[0], sample) and torch.equal(again[1], timestep)


@pytest.mark.gpu
def test_gpu_run_never_synchronises_and_a_graph_replays_the_same_bits(check_capture):
    flow = flow_of("epsilon").to("cuda")
    latents, noise, t = (x.cuda() for x in operands((16, 4, 64, 64), torch.bfloat16))
    check_capture(lambda: align(latents, noise, t, flow))
