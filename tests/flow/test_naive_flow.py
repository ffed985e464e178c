"""The flow of networks that predict the velocity themselves."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
)

from d2f_fast.errors import ModelError
from d2f_fast.flow.naive_flow import NaiveFlow, uses_published_form


def test_output_is_read_as_the_flow_prediction_of_diffusers():
    flow, t = NaiveFlow(), torch.tensor([0.0, 0.25, 1.0])
    latents, noise = torch.randn(2, 3, 4, 2, 2)
    assert flow.timestep(t).tolist() == [1000.0, 750.0, 0.0]
    torch.testing.assert_close(flow.flow_time(flow.timestep(t)), t)
    target = flow.model_target(latents, noise, t)
    x_t = flow.interpolate(latents, noise, t)
    torch.testing.assert_close(flow.velocity(target, x_t, t), latents - noise)
    torch.testing.assert_close(flow.predicted_latents(target, x_t, t), latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shared_formulas_give_the_bits_of_the_direct_ones(dtype):
    flow, t = NaiveFlow(), torch.rand(5)
    latents, noise, output = torch.randn(3, 5, 4, 2, 2).to(dtype)
    x_t = flow.interpolate(latents, noise, t)
    assert torch.equal(flow.to_sample(x_t, t), x_t) and torch.equal(flow.to_flow(x_t, t), x_t)
    assert torch.equal(flow.model_target(latents, noise, t), noise - latents)
    assert torch.equal(flow.velocity(output, x_t, t), -output)
    for result in (x_t, flow.to_sample(x_t, t), flow.model_target(latents, noise, t), flow.velocity(output, x_t, t)):
        assert result.dtype == dtype


def test_euler_step_adds_the_velocity_to_the_state():
    flow, t = NaiveFlow(), torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    a, b = flow.euler_coefficients(t, t + 0.25)
    assert a.tolist() == [1.0] * 3 and b.tolist() == [-0.25] * 3


def test_flow_has_no_table_and_is_the_same_on_every_device():
    flow = NaiveFlow(500)
    assert flow.to("meta") is flow and flow.rising_flow_times(torch.float32) is None
    assert (flow.prediction_type, flow.num_train_timesteps, flow.t_min, flow.t_max) == ("flow_prediction", 500, 0, 1)


def test_times_are_uniform_before_the_shift_and_have_no_other_spacing():
    assert NaiveFlow().times(4).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(NaiveFlow().times(4, shift=3.0), torch.tensor([0, 0.1, 0.25, 0.5, 1.0]))
    with pytest.raises(ValueError, match="spacing must be \"uniform\" for flow_prediction, got 'trailing'"):
        NaiveFlow().times(4, "trailing")


def test_published_form_feeds_flow_time_and_returns_the_velocity():
    flow, t = NaiveFlow(form="published"), torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    latents, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    assert torch.equal(flow.timestep(t), t) and torch.equal(flow.flow_time(t), t)
    velocity = latents - noise
    x_t = flow.interpolate(latents, noise, t)
    assert torch.equal(flow.model_target(latents, noise, t), velocity)
    assert torch.equal(flow.velocity(velocity, x_t, t), velocity)
    torch.testing.assert_close(flow.predicted_latents(velocity, x_t, t), latents)
    a, b = flow.euler_coefficients(t, t + 0.25)
    assert a.tolist() == [1.0] * 3 and b.tolist() == [0.25] * 3
    assert uses_published_form(flow) and not uses_published_form(NaiveFlow())


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_sigmas_are_those_of_diffusers_flow_matching_scheduler(shift):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(torch.tensor(NaiveFlow().sigmas(4, shift)), stock.sigmas)


def test_flow_of_a_scheduler_has_its_timesteps_and_form():
    flow = NaiveFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500))
    assert (flow.num_train_timesteps, flow.form) == (500, "diffusers")
    broken = FlowMatchEulerDiscreteScheduler()
    broken.register_to_config(fm_form="other")
    with pytest.raises(ModelError, match=r"FlowMatchEulerDiscreteScheduler has .* fm_form 'other': correct its"):
        NaiveFlow.from_scheduler(broken)
