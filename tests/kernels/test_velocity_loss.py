"""The loss kernels in Triton's interpreter against float64 numpy; the op eager, compiled, traced and on a GPU.

The oracle goes from the output through x̂0 and ε̂ to the velocity, never through P, Q or a model target.
"""

import sys

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import DDIMScheduler

from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.kernels.runtime import INTERPRET
from d2f_fast.kernels.velocity_loss import velocity_loss_launch, velocity_loss_reference
from d2f_fast.ops import aligned_loss

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
WEIGHTINGS = ("flow", "native", "min_snr")
CASES = [(p, w) for p in PREDICTION_TYPES for w in WEIGHTINGS if (p, w) != ("flow_prediction", "min_snr")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The samples have one element, less than a block, exactly a block, and several blocks and a part.
SHAPES = [(5, 1, 1, 1), (1, 1, 7, 9), (3, 4, 16, 32), (2, 4, 33, 35)]


def flow_of(prediction_type, zero_snr=False):
    if prediction_type == "flow_prediction":
        return NaiveFlow()
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    return Alignment.from_scheduler(scheduler)


def settings(prediction_type, weighting="flow", zero_snr=False, snr_gamma=5.0):
    flow = flow_of(prediction_type, zero_snr)
    return prediction_type, flow.t_min, flow.t_max, weighting, snr_gamma


def to_kernel(x):
    """Return x on the device where the kernel runs, in the same memory layout: the CPU for Triton's interpreter."""
    if not isinstance(x, torch.Tensor) or INTERPRET:
        return x
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())


def launch(*operands):
    """Return the outputs of `velocity_loss_launch`, on the CPU."""
    return [x.cpu() for x in velocity_loss_launch(*map(to_kernel, operands))]


def inside_nan(x):
    """Return a copy of x with the same strides, in memory with NaN (or True) before and after it."""
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
    soft[-1] = 0  # an empty mask
    return {
        "none": None,
        "bool": torch.rand(batch, 1, height, width) > 0.4,
        "soft, one empty": soft,
        "per channel": torch.rand(1, channels, 1, 1),
        "float64": torch.rand(1, 1, height, width, dtype=torch.float64),
    }


def truth(output, latents, noise, t, mask, prediction_type, t_min, t_max, weighting, gamma):
    """Return the loss and gradient of each sample in float64; then both with every term of the error made positive.

    The second pair is the size of what was rounded, which the error itself, a difference, does not show.
    """
    output, latents, noise, t = (x.double().numpy() for x in (output, latents, noise, t))
    t = t.reshape(-1, 1, 1, 1)
    n, read_at = np.hypot(t, 1 - t), np.clip(t, t_min, t_max)
    alpha, sigma = read_at / np.hypot(read_at, 1 - read_at), (1 - read_at) / np.hypot(read_at, 1 - read_at)

    def velocity(output, x_t):
        sample = x_t / n
        with np.errstate(divide="ignore", invalid="ignore"):
            if prediction_type == "flow_prediction":
                return -output
            if prediction_type == "epsilon":
                x0, eps = (sample - sigma * output) / alpha, output
            elif prediction_type == "v_prediction":
                x0, eps = alpha * sample - sigma * output, sigma * sample + alpha * output
            else:
                x0, eps = output, (sample - alpha * output) / sigma
            return np.where(t < t_min, (x0 - x_t) / (1 - t), np.where(t > t_max, (x_t - eps) / t, x0 - eps))

    error = velocity(output, t * latents + (1 - t) * noise) - (latents - noise)
    positive = np.abs(velocity(np.abs(output), 0)) + np.abs(latents) + np.abs(noise)
    positive += np.abs(velocity(np.zeros_like(output), t * np.abs(latents) + (1 - t) * np.abs(noise)))
    slope = velocity(np.ones_like(output), 0)
    factor = {"flow": 1.0, "native": slope**-2, "min_snr": 0.0}[weighting]
    if weighting == "min_snr":
        factor = gamma / np.maximum((alpha / sigma) ** 2, gamma)
    weights = np.ones_like(error) if mask is None else np.broadcast_to(mask.double().numpy(), error.shape)
    total = weights.sum((1, 2, 3), keepdims=True)
    weights = factor * weights / np.where(total == 0, 1, total)
    loss, size = ((weights * x**2).sum((1, 2, 3)) for x in (error, positive))
    return loss, 2 * weights * error * slope, size, 2 * weights * positive * np.abs(slope)


def rms(x):
    return np.sqrt(np.square(x).mean())


# How far float32 may be from float64, in units of 2**-24 of the size of the rounded numbers. The longest path, of x0
# and ε, has these roundings: n 3 (1 - t, doubled by the square, a square, a sum, halved by the root, the root), alpha,
# sigma 5, P 7, Q 11; P t / n 12, and divided by Q the coefficients e and f 25; the error, after two products and two
# sums, 29; its square 59. A block's sum adds 11 levels and the sum of blocks one, the mask's sums as many; then come a
# division, Q² 23 and the factor of min_snr 14: at most 125 for a loss, 7.5e-6. As they go either way, they add up like
# the root of their number, 11. Among 18,000 samples, many close to the ends of the table, the loss was off by at most
# 6.8 and the gradient by 7.9: it has half the roundings, but no sum over elements in which they cancel. Plain torch was
# off by 5.4 and 8.0.
UNITS = 16 * 2.0**-24
# Largest error of one rounding to a type: half a unit in the last place, or half of its smallest number.
ROUNDING = {torch.float32: (2.0**-24, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0)}


def assert_right(got, output, latents, noise, t, mask, *options):
    """Assert that loss and gradient are near float64, and the gradient is rounded once, to the output's type."""
    loss, error, slope = got
    assert loss.dtype == error.dtype == slope.dtype == torch.float32
    assert loss.shape == slope.shape == t.shape and error.shape == output.shape
    exact, exact_gradient, size, gradient_size = truth(output, latents, noise, t, mask, *options)
    gradient = slope.reshape(-1, 1, 1, 1) * error
    within = UNITS * gradient_size
    assert (np.abs(loss.double().numpy() - exact) <= UNITS * size).all()
    assert (np.abs(gradient.double().numpy() - exact_gradient) <= within).all()
    relative, smallest = ROUNDING[output.dtype]
    low = gradient.to(output.dtype).double().numpy()
    assert (np.abs(low - exact_gradient) <= within + relative * (np.abs(exact_gradient) + within) + smallest).all()


@pytest.mark.parametrize(
    ("prediction_type", "weighting", "zero_snr"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[0] in ("v_prediction", "sample")],
)
def test_kernels_give_loss_and_gradient_for_every_prediction_and_weighting(prediction_type, weighting, zero_snr):
    options = settings(prediction_type, weighting, zero_snr)
    for shape in SHAPES[1:3]:
        arguments = operands(shape)
        for mask in list(masks(shape).values())[:3]:
            given = [None if x is None else inside_nan(x) for x in (*arguments, mask)]
            assert_right(launch(*given, *options, True), *arguments, mask, *options)


@pytest.mark.parametrize("snr_gamma", [1.0, 20.0])
@pytest.mark.parametrize("function", [launch, lambda *operands: velocity_loss_reference(*operands[:-1])])
def test_min_snr_uses_the_given_gamma(function, snr_gamma):
    arguments, options = operands((9, 1, 7, 9)), settings("epsilon", "min_snr", snr_gamma=snr_gamma)
    arguments[-1][3:] = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])  # an SNR of 0.4 to 81
    assert_right(function(*arguments, None, *options, True), *arguments, None, *options)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_kernel_error_is_at_most_that_of_plain_torch(prediction_type):
    # With few samples either may be nearer by chance: there are 128, a third of them close to the ends of the table.
    output, latents, noise, t = operands((128, 4, 8, 8))
    t[3:23], t[23:43] = torch.linspace(0, 0.08, 20), torch.linspace(0.96, 1, 20)
    arguments, options = (output, latents, noise, t, None), settings(prediction_type)
    exact, exact_gradient, size, gradient_size = truth(*arguments, *options)
    found = []
    for loss, error, slope in (launch(*arguments, *options, True), velocity_loss_reference(*arguments, *options)):
        gradient = slope.reshape(-1, 1, 1, 1) * error
        found.append([rms((loss.double().numpy() - exact) / size)])
        found[-1].append(rms((gradient.double().numpy() - exact_gradient) / gradient_size))
    assert (np.array(found[0]) <= 1.2 * np.array(found[1])).all(), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_serve_every_shape_type_and_mask(dtype):
    options = settings("v_prediction")
    for shape in SHAPES:
        arguments = operands(shape, dtype)
        for mask in masks(shape).values():
            given = [None if x is None else inside_nan(x) for x in (*arguments, mask)]
            assert_right(launch(*given, *options, True), *arguments, mask, *options)


def test_operands_of_different_types_are_combined_in_float32():
    options = settings("epsilon")
    for dtypes in ((torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.bfloat16, torch.bfloat16)):
        *tensors, t = operands((2, 4, 9, 9))
        arguments = (*(x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)), t)
        assert_right(launch(*arguments, None, *options, True), *arguments, None, *options)


def layouts():
    """Return tensors [4, 3, 8, 9] in every layout that a caller's operands may have."""
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
def test_kernels_pair_the_same_elements_in_every_layout(output_layout, other_layout):
    options, output = settings("v_prediction"), layouts()[output_layout]
    latents, noise = layouts()[other_layout], layouts()["transposed"]
    t, mask = torch.rand(8)[::2], torch.rand(4, 9, 1, 8).permute(0, 2, 3, 1) > 0.3
    for arguments in ((output, latents, noise, t, mask), (output, noise, latents, t, None)):
        got = launch(*arguments, *options, True)
        assert_right(got, *arguments, *options)
        wanted = torch.channels_last if output_layout == "channels_last" else torch.contiguous_format
        assert got[1].is_contiguous(memory_format=wanted)


def test_offsets_beyond_32_bits_are_right():
    torch.utils.deterministic.fill_uninitialized_memory = False  # of 4 GB, only a few pages are ever touched
    output = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 1, 4, 4), (2**30, 16, 4, 1))
    output.copy_(torch.randn(3, 1, 4, 4))
    arguments, options = (
        (output, output.flip(0), output.flip(1), torch.tensor([0.2, 0.5, 0.9]), None),
        settings("sample"),
    )
    assert_right(launch(*arguments, *options, True), *arguments, *options)


def test_partial_sums_of_many_blocks_are_added_up(monkeypatch):
    monkeypatch.setattr(sys.modules["d2f_fast.kernels.velocity_loss"], "SUM_BLOCK", 4)
    shape, options = (2, 4, 75, 75), settings("epsilon", "min_snr")  # 11 blocks are summed in three rounds
    arguments = operands(shape)
    for mask in (None, torch.rand(2, 1, 75, 75)):
        assert_right(launch(*arguments, mask, *options, True), *arguments, mask, *options)


def test_times_outside_the_unit_interval_and_nan_give_the_results_of_plain_torch():
    for prediction_type, weighting in CASES:
        output, latents, noise, _ = operands((3, 4, 5, 5))
        arguments = (output, latents, noise, torch.tensor([-0.25, 1.25, torch.nan]), None)
        options = settings(prediction_type, weighting)
        got, expected = launch(*arguments, *options, True), velocity_loss_reference(*arguments, *options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_empty_batch_gives_an_empty_loss():
    output, t = torch.zeros(0, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(0)
    for function in (launch, torch.ops.d2f_fast.velocity_loss):
        for mask in (None, torch.ones(1, 1, 8, 8)):
            loss, error, slope = function(output, output, output, t, mask, *settings("epsilon"), True)
            assert loss.shape == slope.shape == (0,) and error.shape == output.shape


def test_kernels_give_the_same_bits_every_time():
    arguments, options = operands((3, 4, 33, 35)), settings("epsilon", "min_snr")
    mask = torch.rand(3, 1, 33, 35)
    runs = [launch(*arguments, mask, *options, True) for _ in range(3)]
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(run, runs[0], strict=True))
    without = launch(*arguments, mask, *options, False)
    assert torch.equal(without[0], runs[0][0]) and without[1].shape == (0,)


@pytest.mark.parametrize("masked", [False, True])
def test_op_passes_opcheck(masked):
    for dtype, layout in ((torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format)):
        output, latents, noise, t = operands((2, 4, 6, 6), dtype)
        output = output.contiguous(memory_format=layout)
        mask = torch.rand(2, 1, 6, 6) > 0.5 if masked else None
        arguments = (output, latents, noise, t, mask, *settings("epsilon", "min_snr"), True)
        torch.library.opcheck(torch.ops.d2f_fast.velocity_loss.default, arguments)


@pytest.mark.parametrize(("prediction_type", "weighting"), CASES)
def test_gradient_equals_finite_differences_and_plain_torch(served, prediction_type, weighting):
    output, latents, noise, t = (x.double() for x in operands((3, 1, 3, 3)))
    for mask in (None, torch.rand(3, 1, 3, 1, dtype=torch.float64)):

        def loss(output, latents=latents, mask=mask):
            return aligned_loss(
                output, latents, noise, t, flow_of(prediction_type), weighting, mask=mask, reduction="none"
            )

        output = output.detach().requires_grad_()
        assert torch.autograd.gradcheck(loss, (output,))
        upstream = torch.rand(3, dtype=torch.float64)
        (got,) = torch.autograd.grad(loss(output), output, upstream)
        plain = loss(output, latents.clone().requires_grad_())  # the op has no gradient for latents
        (expected,) = torch.autograd.grad(plain, output, upstream)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_gradient_has_the_type_and_layout_of_the_output_and_does_not_underflow(served):
    output, latents, noise, t = operands((2, 4, 64, 64), torch.float16)
    output = output.contiguous(memory_format=torch.channels_last).requires_grad_()
    # 2 * error / 16384 alone would be subnormal in float16; gradient scaling must bring it back.
    loss = aligned_loss(output, latents, noise, t, flow_of("v_prediction"))
    (gradient,) = torch.autograd.grad(loss * 2.0**14, output)
    exact = truth(output.detach(), latents, noise, t, None, *settings("v_prediction"))[1] * 2.0**14 / 2
    assert gradient.dtype == torch.float16 and gradient.stride() == output.stride()
    assert (np.abs(gradient.double().numpy() - exact) <= 2.0**-11 * 1.01 * np.abs(exact) + 2.0**-24).all()


def test_second_derivative_is_refused_where_the_op_serves(served):
    output, latents, noise, t = operands((2, 1, 3, 3))
    output.requires_grad_()
    loss = aligned_loss(output, latents, noise, t, flow_of("epsilon"))
    with pytest.raises(RuntimeError, match="aligned_loss can be differentiated once, got create_graph=True"):
        torch.autograd.grad(loss, output, create_graph=True)


@pytest.mark.parametrize("cards", ["90", pytest.param("80,86,89,90,120", marks=pytest.mark.slow)])
def test_kernels_compile_without_spills_and_with_16_byte_access_for_every_gpu(cards, compile_ahead):
    compiled = compile_ahead("aot_velocity_loss.py", cards)
    assert {case.split()[0] for case in compiled} == {f"sm_{card}" for card in cards.split(",")}
    for case, found in compiled.items():
        assert found["spills"] == found["stack"] == 0, case
        if case.endswith("sum"):  # registers do not limit one small program a sample
            continue
        assert found["registers"] <= 64, case
        # Two of the three operands may be strided; 32-bit elements, also those of the error, take two accesses each.
        loads = 1 if "channels_last" in case else 6 if "fp32" in case else 3
        assert (found["wide_loads"], found["wide_stores"]) == (loads, 2), case


@pytest.mark.gpu
@pytest.mark.parametrize(("prediction_type", "weighting"), CASES)
def test_gpu_loss_and_gradient_are_exact_up_to_rounding(prediction_type, weighting):
    flow = flow_of(prediction_type)
    output, latents, noise, t = operands((16, 4, 64, 64), torch.bfloat16)
    for mask in (None, torch.rand(16, 1, 64, 64) > 0.3):
        exact, exact_gradient, size, gradient_size = truth(
            output, latents, noise, t, mask, *settings(prediction_type, weighting)
        )
        wanted = output.cuda().contiguous(memory_format=torch.channels_last).requires_grad_()
        arguments = (wanted, *(x.cuda() for x in (latents, noise, t)), flow, weighting)
        options = {"mask": None if mask is None else mask.cuda(), "reduction": "none"}
        loss = aligned_loss(*arguments, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), wanted)
        assert gradient.dtype == torch.bfloat16 and gradient.stride() == wanted.stride()
        assert (np.abs(loss.detach().cpu().double().numpy() - exact) <= UNITS * size).all()
        within = UNITS * gradient_size + 2.0**-8 * (np.abs(exact_gradient) + UNITS * gradient_size)
        assert (np.abs(gradient.cpu().double().numpy() - exact_gradient) <= within).all()
        for _ in range(100):
            again = aligned_loss(*arguments, **options)
            assert torch.equal(again, loss) and torch.equal(torch.autograd.grad(again.sum(), wanted)[0], gradient)


@pytest.mark.gpu
def test_gpu_run_never_synchronises_and_a_graph_replays_the_same_bits(check_capture):
    flow = flow_of("epsilon")
    output, latents, noise, t = (x.cuda() for x in operands((16, 4, 64, 64), torch.bfloat16))
    output = output.contiguous(memory_format=torch.channels_last).requires_grad_()
    mask = torch.rand(16, 1, 64, 64, device="cuda") > 0.3

    def run():
        loss = aligned_loss(output, latents, noise, t, flow, mask=mask)
        return loss.detach(), torch.autograd.grad(loss, output)[0]

    check_capture(run)
