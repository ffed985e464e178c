"""`align` and `aligned_loss` against float64 numpy that goes through x̂0 and ε̂, never through P, Q or a model target."""

import itertools
import re

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounterWithBackend

from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.ops import align, aligned_loss

SCHEDULES = {
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
CASES = [
    (name, prediction_type, zero_snr)
    for name, prediction_type, zero_snr in itertools.product(
        SCHEDULES, ("epsilon", "v_prediction", "sample"), (False, True)
    )
    if not (prediction_type == "epsilon" and zero_snr)
]
WEIGHTINGS = ("flow", "native", "min_snr")
SHAPE = (6, 4, 3, 5)


def scheduler_of(name, prediction_type, zero_snr=False):
    return DDIMScheduler(**SCHEDULES[name], prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)


def alignment_of(name, prediction_type, zero_snr=False):
    return Alignment.from_scheduler(scheduler_of(name, prediction_type, zero_snr))


def operands(dtype=torch.float64, shape=SHAPE, seed=0):
    """Return latents, noise, an imperfect output, and times that include both ends."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise, output = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    t = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    t[:2] = torch.tensor([0.0, 1.0])
    t[2] = 0.03
    return latents, noise, output, t if dtype == torch.float64 else t.float()


class Oracle:
    """Velocity error, its derivative with respect to the output, and the weightings, in float64 numpy."""

    def __init__(self, scheduler, t):
        abar = scheduler.alphas_cumprod.double().numpy()
        self.prediction_type = scheduler.config.prediction_type
        self.r = np.sqrt(abar) / (np.sqrt(abar) + np.sqrt(1 - abar))
        self.t = t.double().numpy().reshape(-1, 1, 1, 1)
        # ε is read at 1 / alpha <= 200, wherever the table ends.
        epsilon_floor = 1 / (1 + np.sqrt(200.0**2 - 1)) if self.prediction_type == "epsilon" else 0.0
        self.lowest = max(self.r[-1], epsilon_floor)
        t_read = np.clip(self.t, self.lowest, self.r[0])
        self.alpha, self.sigma = t_read / np.hypot(t_read, 1 - t_read), (1 - t_read) / np.hypot(t_read, 1 - t_read)

    def timestep(self):
        return np.interp(np.maximum(self.t.ravel(), self.lowest), self.r[::-1], np.arange(len(self.r))[::-1])

    def state(self, latents, noise):
        x_t = self.t * latents + (1 - self.t) * noise
        return x_t / np.hypot(self.t, 1 - self.t)

    def velocity(self, sample, output):
        x_t = sample * np.hypot(self.t, 1 - self.t)
        if self.prediction_type == "epsilon":
            x0, eps = (sample - self.sigma * output) / self.alpha, output
        elif self.prediction_type == "v_prediction":
            x0, eps = self.alpha * sample - self.sigma * output, self.sigma * sample + self.alpha * output
        else:
            x0, eps = output, (sample - self.alpha * output) / self.sigma
        with np.errstate(divide="ignore", invalid="ignore"):
            below, above = (x0 - x_t) / (1 - self.t), (x_t - eps) / self.t
        return np.where(self.t < self.lowest, below, np.where(self.t > self.r[0], above, x0 - eps))

    def slope(self):
        """Return the derivative of the velocity, which is linear in the output, with respect to the output."""
        zero = np.zeros_like(self.t)
        return self.velocity(zero, zero + 1) - self.velocity(zero, zero)

    def factor(self, weighting):
        """Return the weighting's factor on the velocity error."""
        if weighting == "flow":
            return np.ones_like(self.t)
        if weighting == "native":
            return 1 / self.slope() ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            snr = (self.alpha / self.sigma) ** 2
            return np.where(snr == 0, 1.0, np.minimum(snr, 5.0) / snr)

    def loss_and_gradient(self, output, latents, noise, weighting, mask):
        """Return the loss of each sample, and the gradient of their mean."""
        error = self.velocity(self.state(latents, noise), output) - (latents - noise)
        weights = np.broadcast_to(mask, error.shape)
        total = weights.sum((1, 2, 3), keepdims=True)
        weights = self.factor(weighting) * weights / np.where(total == 0, 1, total)
        gradient = 2 * weights * error * self.slope() / len(output)
        return (weights * error**2).sum((1, 2, 3)), gradient


def assert_close(got, expected, tolerance):
    """Assert that each sample is within `tolerance`, one number or one per sample, of its own largest element."""
    got, expected = (x.reshape(len(x), -1) for x in (got.detach().double().numpy(), expected))
    assert (np.abs(got - expected).max(1) <= tolerance * np.maximum(np.abs(expected).max(1), 1e-30)).all()


@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), CASES)
def test_align_returns_the_diffusion_state_and_fractional_timestep(name, prediction_type, zero_snr):
    scheduler = scheduler_of(name, prediction_type, zero_snr)
    latents, noise, _, t = operands(torch.float32)
    sample, timestep = align(latents, noise, t, Alignment.from_scheduler(scheduler))
    oracle = Oracle(scheduler, t)
    assert sample.dtype == timestep.dtype == torch.float32
    assert_close(sample, oracle.state(latents.double().numpy(), noise.double().numpy()), 3e-7)
    np.testing.assert_allclose(timestep, oracle.timestep(), atol=1e-3)


def test_align_returns_flow_state_and_flow_timestep_for_naive_flow():
    latents, noise, _, t = operands(torch.float32)
    sample, timestep = align(latents, noise, t, NaiveFlow())
    time = t.reshape(-1, 1, 1, 1).double()
    assert_close(sample, (time * latents + (1 - time) * noise).numpy(), 3e-7)
    np.testing.assert_allclose(timestep, 1000 * (1 - t.double()), rtol=3e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_align_rounds_low_precision_latents_once_and_never_the_timestep(dtype):
    alignment = alignment_of("sd", "epsilon")
    latents, noise, _, t = operands(torch.float32, (64, 4, 8, 8))
    latents, noise = latents.to(dtype), noise.to(dtype)
    sample, timestep = align(latents, noise, t, alignment)
    exact, exact_timestep = align(latents.double(), noise.double(), t.double(), alignment)
    assert sample.dtype == dtype and timestep.dtype == torch.float32
    # A float32 sum next to a tie may, rarely, round the other way.
    assert (sample != exact.to(dtype)).float().mean() < 1e-3
    assert (timestep - exact_timestep).abs().max() < 1e-3


def test_align_returns_the_type_of_the_latents_for_noise_of_any_type():
    latents, noise, _, t = operands(torch.float32)
    sample, _ = align(latents.bfloat16(), noise, t, alignment_of("sd", "epsilon"))
    assert sample.dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [None, "binary", "soft"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), CASES)
def test_loss_and_gradient_equal_the_closed_form(name, prediction_type, zero_snr, weighting, mask):
    scheduler = scheduler_of(name, prediction_type, zero_snr)
    alignment = Alignment.from_scheduler(scheduler)
    for dtype, rounding in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        latents, noise, output, t = operands(dtype)
        weights = None
        if mask is not None:
            weights = torch.rand(SHAPE[0], 1, *SHAPE[2:])
            weights = (weights > 0.4) if mask == "binary" else weights * 0.01
            weights[3] = 0
        oracle = Oracle(scheduler, t)
        # Reading x̂0 from ε divides by alpha, and ε̂ from x0 by sigma, which enlarges the rounding errors.
        divisor = {"epsilon": oracle.alpha, "sample": oracle.sigma}.get(prediction_type, np.ones_like(oracle.t))
        tolerance = rounding / divisor.ravel()
        expected, gradient = oracle.loss_and_gradient(
            *(x.double().numpy() for x in (output, latents, noise)),
            weighting,
            1.0 if weights is None else weights.double().numpy(),
        )
        output.requires_grad_()
        per_sample = aligned_loss(output, latents, noise, t, alignment, weighting, weights, "none")
        loss = aligned_loss(output, latents, noise, t, alignment, weighting, weights)
        loss.backward()
        assert per_sample.shape == SHAPE[:1] and loss.shape == () and loss.dtype == dtype
        assert_close(per_sample, expected, tolerance)
        assert_close(output.grad, gradient, tolerance)
        torch.testing.assert_close(loss, per_sample.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), CASES)
def test_loss_and_gradient_are_finite_at_both_ends(name, prediction_type, zero_snr, dtype):
    alignment = alignment_of(name, prediction_type, zero_snr)
    t = torch.tensor([0.0, 1.0, alignment.t_min, alignment.t_max, 0.5])
    latents, noise, output = (torch.randn(5, 4, 8, 8).to(dtype) for _ in range(3))
    for weighting in WEIGHTINGS:
        output = output.detach().requires_grad_()
        loss = aligned_loss(output, latents, noise, t, alignment, weighting)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert output.grad.dtype == dtype and output.grad.isfinite().all()
        assert (output.grad != 0).any(dim=(1, 2, 3)).all()


def test_mixed_precisions_are_compared_in_float32():
    alignment = alignment_of("sd", "v_prediction")
    latents, noise, output, t = operands(torch.float32)
    output = output.bfloat16()
    low, high = output.clone().requires_grad_(), output.float().requires_grad_()
    losses = [aligned_loss(x, latents, noise, t, alignment) for x in (low, high)]
    (losses[0] + losses[1]).backward()
    assert torch.equal(*losses)
    assert torch.equal(low.grad, high.grad.bfloat16())
    # A float32 output is not rounded to the type of low-precision latents either.
    output = torch.randn(SHAPE)
    cached = aligned_loss(output, latents.bfloat16(), noise, t, alignment)
    assert torch.equal(cached, aligned_loss(output, latents.bfloat16().float(), noise, t, alignment))


def test_perfect_output_for_an_actual_state_has_no_loss():
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = scheduler_of("sd", prediction_type)
        latents, noise, _, _ = operands(torch.float32)
        timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
        perfect = {
            "epsilon": noise,
            "v_prediction": scheduler.get_velocity(latents, noise, timesteps),
            "sample": latents,
        }[prediction_type]
        alignment = Alignment.from_scheduler(scheduler)
        t = alignment.flow_time(timesteps)
        assert aligned_loss(perfect, latents, noise, t, alignment, reduction="none").max() < 1e-9


def test_mask_weighs_elements_and_not_the_sample():
    alignment = alignment_of("sd", "epsilon")
    latents, noise, output, t = operands()
    plain = aligned_loss(output, latents, noise, t, alignment, reduction="none")
    for weight in (1e-3, 1.0, 100.0):
        mask = torch.full((SHAPE[0], 1, *SHAPE[2:]), weight)
        masked = aligned_loss(output, latents, noise, t, alignment, mask=mask, reduction="none")
        torch.testing.assert_close(masked, plain)


def test_empty_mask_gives_zero_loss_and_gradient():
    alignment = alignment_of("sd", "epsilon")
    latents, noise, output, t = operands(torch.float32)
    output.requires_grad_()
    mask = torch.ones(SHAPE[0], 1, *SHAPE[2:], dtype=torch.bool)
    mask[2] = False
    per_sample = aligned_loss(output, latents, noise, t, alignment, mask=mask, reduction="none")
    per_sample.sum().backward()
    assert per_sample[2] == 0 and (output.grad[2] == 0).all()
    assert per_sample.isfinite().all() and (per_sample[[0, 1, 3, 4, 5]] > 0).all()


def test_naive_flow_loss_is_the_squared_error_of_noise_minus_latents():
    latents, noise, output, t = operands()
    for weighting in ("flow", "native"):
        loss = aligned_loss(output, latents, noise, t, NaiveFlow(), weighting)
        torch.testing.assert_close(loss, torch.nn.functional.mse_loss(output, noise - latents))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"noise": torch.zeros(1, *SHAPE[1:])},
            r"noise must have the latents' shape \[6, 4, 3, 5\], got \[1, 4, 3, 5\]",
        ),
        ({"t": torch.zeros(6, dtype=torch.bfloat16)}, r"t must be float32 of shape \[6\], got torch.bfloat16 \[6\]"),
        ({"t": torch.zeros(1)}, r"t must be float32 of shape \[6\], got torch.float32 \[1\]"),
        ({"t": torch.zeros(6, dtype=torch.int64)}, r"t must be float32 of shape \[6\], got torch.int64"),
        ({"model_output": torch.zeros(6, 8, 3, 5)}, r"model_output must have the latents' shape \[6, 4, 3, 5\], got"),
        ({"reduction": "sum"}, r"reduction must be one of \('mean', 'none'\), got 'sum'"),
        ({"weighting": "snr"}, r"loss_weighting must be one of \('flow', 'native', 'min_snr'\), got 'snr'"),
        ({"weighting": "min_snr", "flow": NaiveFlow()}, '"min_snr" needs a diffusion prediction'),
        (
            {"mask": torch.ones(6, 3, 5)},
            r"mask must have 4 dimensions that broadcast to \[6, 4, 3, 5\], got \[6, 3, 5\]",
        ),
        ({"mask": torch.ones(6, 1, 6, 10)}, r"mask must have 4 dimensions that broadcast to .*, got \[6, 1, 6, 10\]"),
        (
            {"noise": torch.zeros(SHAPE, dtype=torch.int64)},
            "noise must be float32, float16, bfloat16 or float64, got torch.int64",
        ),
        (
            {"model_output": torch.zeros(SHAPE, dtype=torch.uint8)},
            "model_output must be float32, float16, bfloat16 or float64, got torch.uint8",
        ),
        ({"noise": torch.zeros(SHAPE, device="meta")}, "noise must be on cpu as the latents, got meta"),
        ({"t": torch.zeros(6, device="meta")}, "t must be on cpu as the latents, got meta"),
        ({"model_output": torch.zeros(SHAPE, device="meta")}, "model_output must be on cpu as the latents, got meta"),
        ({"mask": torch.ones(1, 1, 1, 1, device="meta")}, "mask must be on cpu as the latents, got meta"),
        ({"mask": torch.ones(SHAPE) * 1j}, "mask must hold real numbers, got torch.complex64"),
        ({"snr_gamma": 0.0}, r"snr_gamma must be a positive number, got 0\.0"),
        ({"snr_gamma": float("nan")}, "snr_gamma must be a positive number, got nan"),
        ({"t": torch.zeros(6, 1)}, r"t must be float32 of shape \[6\], got torch.float32 \[6, 1\]"),
    ],
)
def test_unusable_operands_are_refused(change, sentence):
    latents, noise, output, t = operands(torch.float32)
    arguments = {
        "model_output": output,
        "latents": latents,
        "noise": noise,
        "t": t,
        "flow": alignment_of("sd", "epsilon"),
    } | change
    with pytest.raises(ValueError, match=sentence):
        aligned_loss(**arguments)
    if "noise" in change or "t" in change:
        with pytest.raises(ValueError, match=sentence):
            align(latents, arguments["noise"], arguments["t"], arguments["flow"])


@pytest.mark.parametrize("shape", [(), (6,), (6, 4, 0, 5)])
def test_latents_without_elements_or_dimensions_are_refused(shape):
    latents, t, alignment = torch.zeros(shape), torch.zeros(shape[:1]), alignment_of("sd", "epsilon")
    sentence = re.escape(f"latents must have shape [B, C, H, W] with C, H and W at least 1, got {list(shape)}")
    with pytest.raises(ValueError, match=sentence):
        align(latents, latents, t, alignment)
    with pytest.raises(ValueError, match=sentence):
        aligned_loss(latents, latents, latents, t, alignment)


def test_latents_of_integers_are_refused():
    latents, t = torch.zeros(SHAPE, dtype=torch.int32), torch.zeros(6)
    with pytest.raises(ValueError, match=r"latents must be float32, float16, bfloat16 or float64, got torch\.int32"):
        align(latents, latents, t, alignment_of("sd", "epsilon"))


def test_alignment_on_another_device_is_refused():
    latents, noise, _, t = operands(torch.float32)
    with pytest.raises(ValueError, match=r"the alignment must be on cpu as the latents, got meta: use alignment.to"):
        align(latents, noise, t, alignment_of("sd", "epsilon").to("meta"))


def test_empty_batch_gives_empty_state_and_nan_loss():
    empty, t = torch.zeros(0, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(0)
    for flow in (alignment_of("sd", "epsilon"), NaiveFlow()):
        sample, timestep = align(empty, empty, t, flow)
        assert sample.shape == empty.shape and sample.dtype == torch.bfloat16 and timestep.shape == (0,)
        for mask in (None, torch.ones(1, 1, 8, 8)):
            assert aligned_loss(empty, empty, empty, t, flow, mask=mask, reduction="none").shape == (0,)
            assert aligned_loss(empty, empty, empty, t, flow, mask=mask).isnan()  # as the mean of an empty tensor is


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_compiled_step_is_one_graph_for_every_time_and_agrees_with_eager(weighting):
    alignment = alignment_of("sd", "epsilon")
    network = torch.nn.Conv2d(4, 4, 3, padding=1)

    def step(latents, noise, t):
        sample, timestep = align(latents, noise, t, alignment)
        output = network(sample) + 0.1 * (timestep / 100).sin()[:, None, None, None]
        return aligned_loss(output, latents, noise, t, alignment, weighting, mask=latents[:, :1] > -0.5)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(20):
        latents, noise, _, t = operands(torch.float32, seed=seed)
        if seed % 2:
            t = t.clamp(0.1 * (seed % 7), 0.9)
        results = []
        for function in (compiled, step):
            network.zero_grad()
            loss = function(latents, noise, t)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in network.parameters())])
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert counter.frame_count == 1


@pytest.mark.parametrize("value", [-0.01, 1.01, 999.0, float("nan")])
def test_times_outside_the_unit_interval_are_refused_on_a_cpu(value):
    latents, noise, output, t = operands(torch.float32)
    t[-1] = value
    alignment = alignment_of("sd", "epsilon")
    with pytest.raises(ValueError, match=rf"t must be in \[0, 1\], 0 for noise and 1 for data, got {value:g}"):
        align(latents, noise, t, alignment)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        aligned_loss(output, latents, noise, t, alignment)
