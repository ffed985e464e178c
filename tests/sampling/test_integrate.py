"""`sample_flow` against closed-form solutions and diffusers' samplers."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.sampling.integrate import sample_flow, unet_velocity

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}


class DummyUNet:
    """Stand-in for a diffusers UNet: a function of state, timestep and condition that records its batches."""

    dtype = torch.float32

    def __init__(self):
        self.batches = []
        self.conditions = None

    @property
    def conv_in(self):
        return torch.nn.Conv2d(1, 1, 1, dtype=self.dtype)

    def __call__(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=True):
        assert sample.dtype == self.dtype and not return_dict
        self.batches.append(len(sample))
        self.conditions = added_cond_kwargs
        condition = encoder_hidden_states.mean((1, 2))[:, None, None, None].to(sample.dtype)
        time = torch.as_tensor(timestep, dtype=torch.float32)
        return (0.3 * sample + 0.01 * time.sin() + condition,)


def conditions(batch=3):
    return torch.randn(batch, 5, 7), torch.randn(batch, 5, 7)


def predict(unet, sample, timestep, positive, negative, guidance_scale):
    """Return the guided output as the stock pipelines compute it, with one condition at a time."""
    outputs = [unet(sample, timestep, condition, return_dict=False)[0] for condition in (negative, positive)]
    return outputs[0] + guidance_scale * (outputs[1] - outputs[0])


def assert_close(got, expected, tolerance):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def growth(x, t):
    """Return the velocity of x(t) = x(0) exp(sin(3 t) / 3 + t² / 2)."""
    return x * ((3 * t).cos() + t)


def grown(x, t):
    return x * math.exp(math.sin(3 * t) / 3 + t * t / 2)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_error_falls_with_the_order_of_the_method(method, order):
    start = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    errors = [
        (sample_flow(growth, start, steps, method=method) - grown(start, 1.0)).abs().max().item()
        for steps in ((8, 16, 32) if order == 4 else (16, 32, 64))
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.8 if order == 4 else 0.15)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_reversed_times_return_to_the_start_as_steps_grow(method, order):
    start = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    errors = []
    for steps in (25, 100):
        times = torch.linspace(0, 1, steps + 1).square()
        data = sample_flow(growth, start, times=times, method=method)
        assert_close(data, grown(start, 1.0), 0.1)
        errors.append((sample_flow(growth, data, times=times.flip(0), method=method) - start).abs().max().item())
    assert errors[1] < errors[0] / 4**order * 1.3 and errors[1] < 0.05


def test_guided_network_is_inverted_inside_the_table():
    alignment = Alignment.from_scheduler(DDIMScheduler(**SD))
    velocity = unet_velocity(DummyUNet(), alignment, *conditions(), guidance_scale=2.0)
    times = torch.linspace(0.1, 0.95, 401)
    start = torch.randn(3, 4, 8, 8)
    data = sample_flow(velocity, start, times=times, method="heun")
    assert (data - start).abs().max() > 0.5
    assert_close(sample_flow(velocity, data, times=times.flip(0), method="heun"), start, 2e-3)


def test_every_method_takes_the_textbook_step():
    state, t, h = torch.tensor([[1.5, -0.5]]), torch.tensor(0.25), 0.5

    def velocity(x, t):
        return x.square() + t

    slope = velocity(state, t)
    middle = velocity(state + h / 2 * slope, t + h / 2)
    end = velocity(state + h * slope, t + h)
    times = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(sample_flow(velocity, state, times=times), state + h * slope)
    torch.testing.assert_close(sample_flow(velocity, state, times=times, method="midpoint"), state + h * middle)
    torch.testing.assert_close(sample_flow(velocity, state, times=times, method="heun"), state + h * (slope + end) / 2)
    third = velocity(state + h / 2 * middle, t + h / 2)
    last = velocity(state + h * third, t + h)
    runge_kutta = state + h / 6 * (slope + 2 * middle + 2 * third + last)
    torch.testing.assert_close(sample_flow(velocity, state, times=times, method="rk4"), runge_kutta)


def test_guidance_is_off_outside_its_interval_at_half_the_cost():
    alignment = Alignment.from_scheduler(DDIMScheduler(**SD))
    unet, (positive, negative), state = DummyUNet(), conditions(), torch.randn(3, 4, 8, 8)
    added = {"time_ids": torch.arange(12.0).reshape(6, 2)}
    given = (unet, alignment, positive, negative, 3.0, added)
    alone = unet_velocity(unet, alignment, positive, added_cond_kwargs={"time_ids": added["time_ids"][3:]})
    guided, limited = unet_velocity(*given), unet_velocity(*given, guidance_interval=(0.25, 0.75))
    for t, is_guided in ((0.0, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)):
        unet.batches.clear()
        got = limited(state, torch.tensor(t))
        assert unet.batches == [6 if is_guided else 3]
        assert len(unet.conditions["time_ids"]) == unet.batches[0]
        assert torch.equal(got, (guided if is_guided else alone)(state, torch.tensor(t)))
    assert not torch.equal(guided(state, torch.tensor(0.1)), alone(state, torch.tensor(0.1)))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_malformed_guidance_interval_is_refused(interval):
    with pytest.raises(ValueError, match="guidance_interval must be two rising flow times"):
        unet_velocity(DummyUNet(), None, *conditions(), guidance_scale=2.0, guidance_interval=interval)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 5), ("midpoint", 10), ("heun", 10), ("rk4", 20)])
def test_intermediates_are_the_states_at_every_node(method, evaluations):
    seen = []

    def velocity(x, t):
        seen.append((t.ndim, t.dtype))
        return growth(x, t)

    start, times = torch.randn(2, 4), torch.tensor([0.0, 0.1, 0.3, 0.6, 0.7, 1.0])
    states = sample_flow(velocity, start, times=times, method=method, return_intermediates=True)
    assert len(seen) == evaluations and set(seen) == {(0, torch.float32)}
    assert len(states) == 6 and torch.equal(states[0], start)
    assert torch.equal(states[-1], sample_flow(growth, start, times=times, method=method))
    for i in range(1, 6):
        assert torch.equal(states[i], sample_flow(growth, start, times=times[: i + 1], method=method))


def test_default_times_are_uniform_and_the_state_keeps_its_type():
    start = torch.randn(2, 4)
    assert torch.equal(sample_flow(growth, start, 8), sample_flow(growth, start, times=torch.arange(9) / 8))
    for method in ("euler", "midpoint", "heun", "rk4"):
        assert sample_flow(lambda x, t: growth(x.float(), t), start.bfloat16(), method=method).dtype == torch.bfloat16


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5, 2.5])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False)],
)
def test_euler_equals_ddim_on_its_trailing_nodes(prediction_type, zero_snr, guidance_scale):
    ddim = DDIMScheduler(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, clip_sample=False)
    alignment = Alignment.from_scheduler(ddim)
    unet, (positive, negative), noise = DummyUNet(), conditions(), torch.randn(3, 4, 8, 8)
    for steps in (1, 4, 25):
        ddim.set_timesteps(steps)
        expected = noise
        for timestep in ddim.timesteps:
            output = predict(unet, expected, timestep, positive, negative, guidance_scale)
            expected = ddim.step(output, timestep, expected, eta=0.0).prev_sample
        times = torch.cat([alignment.flow_time(ddim.timesteps), torch.ones(1)])
        velocity = unet_velocity(unet, alignment, positive, negative, guidance_scale)
        got = sample_flow(velocity, alignment.to_flow(noise, times[0]), times=times)
        assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_equals_stock_euler_at_the_same_sigmas(prediction_type, guidance_scale):
    euler = EulerDiscreteScheduler(**SD, prediction_type=prediction_type)
    alignment = Alignment.from_scheduler(euler)
    unet, (positive, negative), noise = DummyUNet(), conditions(), torch.randn(3, 4, 8, 8)
    for steps in (1, 4, 25):
        euler.set_timesteps(steps)
        state = noise * (euler.sigmas[0].square() + 1).sqrt()
        for timestep in euler.timesteps:
            scaled = euler.scale_model_input(state, timestep)
            output = predict(unet, scaled, timestep, positive, negative, guidance_scale)
            state = euler.step(output, timestep, state).prev_sample
        times = 1 / (1 + euler.sigmas)
        velocity = unet_velocity(unet, alignment, positive, negative, guidance_scale)
        got = sample_flow(velocity, alignment.to_flow(noise, times[0]), times=times)
        assert_close(got, state, 1e-5)


def test_naive_flow_equals_diffusers_flow_matching_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    unet, (positive, negative), noise = DummyUNet(), conditions(), torch.randn(3, 4, 8, 8)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    expected = noise
    for timestep in scheduler.timesteps:
        output = predict(unet, expected, timestep, positive, negative, 3.0)
        expected = scheduler.step(output, timestep, expected).prev_sample
    velocity = unet_velocity(unet, NaiveFlow(), positive, negative, 3.0)
    assert_close(sample_flow(velocity, noise, times=NaiveFlow().times(4, shift=2.0)), expected, 1e-5)


def test_guidance_is_one_batched_call_and_without_it_the_batch_is_unchanged():
    alignment = Alignment.from_scheduler(DDIMScheduler(**SD))
    positive, negative = conditions()
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor(0.4)
    unet, added = DummyUNet(), {"time_ids": torch.zeros(6, 6)}
    unet_velocity(unet, alignment, positive, negative, 5.0, added)(x_t, t)
    assert unet.batches == [6] and torch.equal(unet.conditions["time_ids"], added["time_ids"])
    unet = DummyUNet()
    plain = unet_velocity(unet, alignment, positive, negative, 1.0)(x_t, t)
    assert unet.batches == [3] and unet.conditions is None
    assert torch.equal(plain, unet_velocity(unet, alignment, positive)(x_t, t))


def test_tensor_of_scales_guides_each_sample_with_its_own() -> None:
    alignment = Alignment.from_scheduler(DDIMScheduler(**SD))
    x_t, t, scales = torch.randn(3, 4, 8, 8), torch.tensor(0.4), [1.0, 2.5, 7.0]
    unet, pair = DummyUNet(), conditions()
    each = unet_velocity(unet, alignment, *pair, torch.tensor(scales).reshape(3, 1, 1, 1))(x_t, t)
    for i, scale in enumerate(scales):
        assert_close(each[i], unet_velocity(unet, alignment, *pair, scale)(x_t, t)[i], 1e-6)


def test_half_precision_network_gets_its_own_type_and_the_state_stays_float32():
    unet = DummyUNet()
    unet.dtype = torch.bfloat16
    alignment = Alignment.from_scheduler(DDIMScheduler(**SD))
    x_t = torch.randn(3, 4, 8, 8)
    velocity = unet_velocity(unet, alignment, *conditions(), guidance_scale=2.0)(x_t, torch.tensor(0.4))
    assert velocity.dtype == torch.float32 and unet.batches == [6]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"method": "rk5"}, r"method must be one of \('euler', 'midpoint', 'heun', 'rk4'\), got 'rk5'"),
        (
            {"times": torch.tensor([0.0, 0.5, 0.5, 1.0])},
            r"strictly monotone tensor of at least two nodes, got \[0.0, 0.5",
        ),
        ({"times": torch.tensor([0.0, 0.7, 0.5])}, "strictly monotone"),
        ({"times": torch.tensor([0.0, float("nan"), 1.0])}, "strictly monotone"),
        ({"times": torch.tensor([0.0, 999.0])}, r"flow times in \[0, 1\], 0 for noise and 1 for data, got \[0.0, 999"),
        ({"times": torch.tensor([1.0, -0.5])}, "flow times in"),
        ({"times": torch.tensor([1.0])}, "at least two nodes"),
        ({"times": torch.tensor(1.0)}, "at least two nodes"),
        ({"times": torch.tensor([[0.0, 1.0]])}, "strictly monotone"),
    ],
)
def test_unusable_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample_flow(growth, torch.zeros(1, 2), **options)


def test_guidance_without_negative_condition_is_refused():
    alignment = Alignment.from_scheduler(DDIMScheduler(**SD))
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0 needs negative_hidden_states"):
        unet_velocity(DummyUNet(), alignment, torch.zeros(1, 2, 3), guidance_scale=3.0)
