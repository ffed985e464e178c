"""`Alignment` and the formulas against a float64 oracle in numpy that goes through x̂0 and ε̂, never through P and Q."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from d2f_fast.errors import ModelError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.formulas import noised_source
from d2f_fast.flow.noise_schedule import NoiseSchedule

SCHEDULES = {
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = [
    (name, prediction, zero)
    for name, prediction, zero in itertools.product(SCHEDULES, PREDICTIONS, (False, True))
    if not (prediction == "epsilon" and zero)
]


def scheduler_of(name: str, prediction_type: str, zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULES[name], prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)


def oracle(alphas_cumprod, prediction_type, t, latents, noise, model_output):
    """Return timestep, diffusion state, velocity and x̂0 in float64, from the definitions."""
    abar = alphas_cumprod.double().numpy()
    alpha_table, sigma_table = np.sqrt(abar), np.sqrt(1 - abar)
    r = alpha_table / (alpha_table + sigma_table)
    # ε is read at 1 / alpha <= 200 (alpha² + sigma² = 1), wherever the table ends.
    lowest = max(r[-1], 1 / (1 + np.sqrt(200.0**2 - 1))) if prediction_type == "epsilon" else r[-1]
    timestep = np.interp(np.maximum(t, lowest), r[::-1], np.arange(len(r))[::-1])
    t_read = np.clip(t, lowest, r[0])[:, None]
    alpha, sigma = t_read / np.hypot(t_read, 1 - t_read), (1 - t_read) / np.hypot(t_read, 1 - t_read)
    t = t[:, None]
    x_t = t * latents + (1 - t) * noise
    sample = x_t / np.hypot(t, 1 - t)
    if prediction_type == "epsilon":
        eps = model_output
        x0 = (sample - sigma * eps) / alpha
    elif prediction_type == "v_prediction":
        x0, eps = alpha * sample - sigma * model_output, sigma * sample + alpha * model_output
    else:
        x0 = model_output
        eps = (sample - alpha * x0) / sigma
    with np.errstate(divide="ignore", invalid="ignore"):
        velocity = np.where(t < lowest, (x0 - x_t) / (1 - t), np.where(t > r[0], (x_t - eps) / t, x0 - eps))
    return timestep, sample, velocity, x0


def relative_rms(got, expected) -> float:
    got = got.double().numpy() if isinstance(got, torch.Tensor) else got
    return float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))


def samples(count: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(count, generator=generator, dtype=dtype)
    t[:4] = torch.tensor([0.0, 1.0, 0.01, 0.99], dtype=dtype)
    return t, *(torch.randn(count, 16, generator=generator, dtype=dtype) for _ in range(3))


# float32: P, Q, sample and the sum each round once (6e-8), times the cancellation in P * sample + Q * output (< 10).
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), CASES)
def test_formulas_agree_with_the_float64_oracle(name, prediction_type, zero_snr, dtype, tolerance):
    scheduler = scheduler_of(name, prediction_type, zero_snr)
    alignment = Alignment.from_scheduler(scheduler)
    t, latents, noise, output = samples(700, dtype)
    expected = oracle(
        scheduler.alphas_cumprod, prediction_type, *(x.double().numpy() for x in (t, latents, noise, output))
    )
    sample = alignment.to_sample(alignment.interpolate(latents, noise, t), t)
    assert relative_rms(alignment.timestep(t), expected[0]) <= tolerance
    assert relative_rms(sample, expected[1]) <= tolerance
    assert relative_rms(alignment.velocity(output, sample, t), expected[2]) <= tolerance
    assert relative_rms(alignment.predicted_latents(output, sample, t), expected[3]) <= tolerance


@pytest.mark.parametrize(("name", "zero_snr"), list(itertools.product(SCHEDULES, (False, True))))
def test_velocity_does_not_depend_on_the_prediction_type_of_a_network(name, zero_snr):
    t, latents, noise, _ = samples(500, torch.float64)
    if name == "cosine":
        t = t.clamp(min=0.006)  # below it, ε is read at another timestep, where 1 / alpha is at most 200
    results = []
    for prediction_type in PREDICTIONS:
        if prediction_type == "epsilon" and zero_snr:
            continue
        alignment = Alignment.from_scheduler(scheduler_of(name, prediction_type, zero_snr))
        sample = alignment.to_sample(alignment.interpolate(latents, noise, t), t)
        alpha, sigma = (c[:, None] for c in alignment.coefficients(t))
        # The network is imperfect and given by its x̂0; its ε̂ follows from x̂0 and from the state that it was given.
        x0 = 0.8 * latents + 0.1
        eps = (sample - alpha * x0) / sigma
        output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction_type]
        results.append(alignment.velocity(output, sample, t))
    for other in results[1:]:
        assert relative_rms(other, results[0].numpy()) <= 1e-11


@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), CASES)
def test_velocity_of_the_model_target_is_latents_minus_noise_at_every_time(name, prediction_type, zero_snr):
    alignment = Alignment.from_scheduler(scheduler_of(name, prediction_type, zero_snr))
    ends = [0.0, alignment.t_min, alignment.t_max, 1.0]
    t, latents, noise, _ = samples(700, torch.float64)
    t[4:8] = torch.tensor(ends, dtype=torch.float64)
    sample = alignment.to_sample(alignment.interpolate(latents, noise, t), t)
    velocity = alignment.velocity(alignment.model_target(latents, noise, t), sample, t)
    # (1 ± P …) / Q loses what 1 / alpha gains: up to 2e4 for ε on a cosine schedule.
    assert (velocity - (latents - noise)).abs().max() <= 1e-10
    t32, latents32, noise32 = t.float(), latents.float(), noise.float()
    sample32 = alignment.to_sample(alignment.interpolate(latents32, noise32, t32), t32)
    velocity32 = alignment.velocity(alignment.model_target(latents32, noise32, t32), sample32, t32)
    # float32 rounds at 6e-8; the read-out divides this by at least the smallest alpha (ε) or sigma (x0).
    read_out = {
        "epsilon": alignment.coefficients(t.new_zeros(()))[0],
        "sample": alignment.coefficients(t.new_ones(()))[1],
    }
    limit = 1e-5 / read_out.get(prediction_type, torch.tensor(1.0)).item()
    assert (velocity32 - (latents32 - noise32)).abs().max() <= limit


@pytest.mark.parametrize(("name", "zero_snr"), list(itertools.product(SCHEDULES, (False, True))))
def test_timestep_and_flow_time_are_inverse_and_agree_with_the_table(name, zero_snr):
    scheduler = scheduler_of(name, "v_prediction", zero_snr)
    alignment = Alignment.from_scheduler(scheduler)
    t = torch.linspace(alignment.t_min, alignment.t_max, 4001)
    assert (alignment.flow_time(alignment.timestep(t)) - t).abs().max() <= 2e-6
    integers = torch.arange(1000.0)
    assert torch.equal(alignment.timestep(alignment.flow_time(integers)), integers)
    abar = scheduler.alphas_cumprod.double()
    expected = abar.sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    torch.testing.assert_close(alignment.flow_time(integers.double()), expected, atol=1e-15, rtol=0)
    assert alignment.timestep(torch.tensor([0.0, 1.0])).tolist() == [999.0, 0.0]


@pytest.mark.parametrize(("name", "prediction_type", "zero_snr"), CASES)
def test_velocity_is_finite_and_continuous_at_both_ends_of_the_table(name, prediction_type, zero_snr):
    alignment = Alignment.from_scheduler(scheduler_of(name, prediction_type, zero_snr))
    p, q = alignment.velocity_coefficients(torch.tensor([0.0, 1.0]))
    assert torch.isfinite(p).all() and torch.isfinite(q).all()
    for end in (alignment.t_min, alignment.t_max):
        near = torch.tensor([end * (1 - 1e-9), end * (1 + 1e-9)], dtype=torch.float64)
        for coefficient in alignment.velocity_coefficients(near):
            torch.testing.assert_close(coefficient[0], coefficient[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_one_step_from_pure_noise_returns_the_predicted_latents(prediction_type):
    alignment = Alignment.from_scheduler(scheduler_of("sd", prediction_type))
    noise, output = torch.randn(2, 3, 16, dtype=torch.float64)
    t = torch.zeros(3, dtype=torch.float64)
    reached = noise + alignment.velocity(output, noise, t)
    torch.testing.assert_close(reached, alignment.predicted_latents(output, noise, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_step_equals_ddim_between_the_same_nodes(prediction_type):
    scheduler = scheduler_of("sd", prediction_type)
    scheduler = DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    alignment = Alignment.from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    nodes = torch.cat([alignment.flow_time(scheduler.timesteps.double()), torch.ones(1)])
    a, b = alignment.euler_coefficients(nodes[:-1], nodes[1:])
    sample = torch.randn(2, 16, dtype=torch.float64)
    for i, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(2, 16, dtype=torch.float64)
        expected = scheduler.step(output, timestep, sample).prev_sample
        sample = a[i] * sample + b[i] * output
        torch.testing.assert_close(sample, expected, rtol=2e-6, atol=2e-6)  # DDIM's table is float32
        sample = expected


def test_sigmas_start_stock_euler_at_pure_noise():
    alignment = Alignment.from_scheduler(scheduler_of("sd", "epsilon"))
    assert alignment.sigmas(4) == pytest.approx([17.614641, 3, 1, 1 / 3, 0], rel=1e-6)
    assert alignment.sigmas(1) == pytest.approx([14.614641, 0], rel=1e-6)
    assert alignment.sigmas(4, shift=2.0)[1:] == pytest.approx([6, 2, 2 / 3, 0])
    assert Alignment.from_scheduler(scheduler_of("sd", "v_prediction", True)).sigmas(2) == [4096.0, 1.0, 0.0]
    # Stock Euler with these sigmas is compared with our start at t = 0, for a network that returns 0.3 x + 0.1.
    euler = EulerDiscreteScheduler.from_config(scheduler_of("sd", "epsilon").config)
    euler.set_timesteps(sigmas=alignment.sigmas(4))
    noise = torch.randn(1, 4, 8, 8)
    latents = noise * euler.init_noise_sigma
    x_t, times = noise, alignment.times(4)
    for i, timestep in enumerate(euler.timesteps):
        output = 0.3 * euler.scale_model_input(latents, timestep) + 0.1
        latents = euler.step(output, timestep, latents).prev_sample
        sample = alignment.to_sample(x_t, times[i])
        x_t = x_t + (times[i + 1] - times[i]) * alignment.velocity(0.3 * sample + 0.1, sample, times[i])
    assert relative_rms(latents, x_t.double().numpy()) <= 3e-3


def test_times_have_the_right_count_and_stay_inside_the_table():
    alignment = Alignment.from_scheduler(scheduler_of("sd", "epsilon"))
    torch.testing.assert_close(alignment.times(4), torch.linspace(0, 1, 5))
    cosine = Alignment.from_scheduler(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    counts, spacings, shifts = (1, 2, 25, 200, 1000), ("uniform", "trailing"), (0.5, 1.0, 3.0, 5.0)
    for flow, steps, spacing, shift in itertools.product((alignment, cosine), counts, spacings, shifts):
        times = flow.times(steps, spacing, shift)
        assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 1
        assert (times[1:] >= flow.t_min - 1e-7).all() and (times.diff() > 0).all(), (steps, spacing, shift)
    ddim = DDIMScheduler.from_config(scheduler_of("sd", "epsilon").config, timestep_spacing="trailing")
    for steps in (2, 4, 8, 25, 7):
        ddim.set_timesteps(steps)
        expected = alignment.flow_time(ddim.timesteps.float())
        torch.testing.assert_close(alignment.times(steps, "trailing")[1:-1], expected[1:])


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.5])
def test_trailing_times_have_ddims_sigmas_times_the_shift(shift):
    alignment = Alignment.from_scheduler(scheduler_of("sd", "epsilon"))
    ddim = DDIMScheduler.from_config(scheduler_of("sd", "epsilon").config, timestep_spacing="trailing")
    ddim.set_timesteps(4)
    abar = ddim.alphas_cumprod.double()[ddim.timesteps[1:]]
    times = alignment.times(4, "trailing", shift)[1:-1].double()
    torch.testing.assert_close((1 - times) / times, shift * ((1 - abar) / abar).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_noised_source_is_the_interpolant_between_noise_and_source(share):
    source, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    expected = (1 - share) * source.numpy() + share * noise.numpy()
    np.testing.assert_allclose(noised_source(source, noise, share).numpy(), expected, rtol=0, atol=1e-15)
    rounded = noised_source(source.float(), noise.float(), share)
    assert rounded.dtype == torch.float32
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=0, atol=5e-7)
    alignment = Alignment(NoiseSchedule.from_scheduler(scheduler_of("sd", "epsilon")))
    between = alignment.interpolate(source, noise, torch.tensor(1 - share, dtype=torch.float64))
    assert torch.equal(between, noised_source(source, noise, share))
    if share in (0.0, 1.0):
        assert torch.equal(rounded, (noise if share else source).float())


def test_low_precision_latents_are_rounded_once():
    alignment = Alignment.from_scheduler(scheduler_of("sd", "epsilon"))
    t, latents, noise, output = (x.to(torch.bfloat16) for x in samples(300, torch.float32))
    t = t.float()
    exact = alignment.velocity(output.double(), latents.double(), t.double())
    assert torch.equal(alignment.velocity(output, latents, t), exact.to(torch.bfloat16)) or (
        # Double rounding through float32 can, rarely, move a tie by one unit in the last place of bfloat16.
        (alignment.velocity(output, latents, t) != exact.to(torch.bfloat16)).float().mean() < 1e-3
    )
    assert alignment.interpolate(latents, noise, t).dtype == torch.bfloat16


def test_device_move_and_compilation_keep_the_results():
    alignment = Alignment.from_scheduler(scheduler_of("sd", "v_prediction")).to("cpu")
    t, latents, noise, output = samples(64, torch.float32)

    def everything(t, latents, noise, output):
        sample = alignment.to_sample(alignment.interpolate(latents, noise, t), t)
        return alignment.velocity(output, sample, t), alignment.timestep(t), alignment.model_target(latents, noise, t)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(t, latents, noise, output), everything(t, latents, noise, output), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"prediction_type": "velocity"}, "prediction_type must be one of"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_unusable_schedulers_are_refused(config, sentence):
    for scheduler_class in (DDIMScheduler, EulerDiscreteScheduler):
        with pytest.raises(ModelError, match=sentence):
            Alignment.from_scheduler(scheduler_class(**config))


def test_scheduler_without_table_or_prediction_type_is_refused():
    with pytest.raises(ModelError, match="has no alphas_cumprod"):
        Alignment.from_scheduler(object())
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type=None)
    with pytest.raises(ModelError, match="has no prediction_type"):
        Alignment.from_scheduler(scheduler)
    with pytest.raises(ModelError, match="decrease strictly"):
        Alignment(NoiseSchedule(torch.tensor([0.9, 0.9, 0.5]), "epsilon"))


def test_time_of_the_wrong_shape_is_refused():
    alignment = Alignment.from_scheduler(scheduler_of("sd", "epsilon"))
    with pytest.raises(ValueError, match=r"t must have shape \[3\] or \[\], got \[2\]"):
        alignment.velocity(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2))
