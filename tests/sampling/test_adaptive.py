"""`sample_flow_adaptive` against closed-form solutions and a fine Runge-Kutta integration."""

import sys

import pytest
import torch

from d2f_fast import load_miniature, sample_flow
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.adaptive import sample_flow_adaptive


def grow(x, t):
    return x * (t + 1)


def test_result_is_exact_to_the_tolerance_in_both_directions():
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    for tolerance in (1e-3, 1e-6, 1e-9):
        data = sample_flow_adaptive(grow, start, rtol=tolerance, atol=tolerance)
        assert ((data / start).log() - 1.5).abs().max() < 10 * tolerance
        back = sample_flow_adaptive(grow, data, torch.tensor([1.0, 0.0]), rtol=tolerance, atol=tolerance)
        assert ((back - start).abs() / start.abs()).max() < 20 * tolerance


def test_smaller_tolerance_takes_more_evaluations():
    counts = []
    for tolerance in (1e-3, 1e-7):
        seen = []
        sample_flow_adaptive(lambda x, t, seen=seen: (seen.append(t), grow(x, t))[1], torch.ones(1), None, tolerance)
        counts.append(len(seen))
    assert counts[0] < counts[1]


def test_intermediates_are_the_states_at_the_given_times_in_the_type_of_the_state():
    start, times = torch.ones(2, 3, dtype=torch.float16), torch.tensor([0.0, 0.3, 1.0])
    states = sample_flow_adaptive(grow, start, times, return_intermediates=True)
    assert len(states) == 3 and torch.equal(states[0], start) and {state.dtype for state in states} == {torch.float16}
    exact = (times + times.square() / 2).exp()
    assert torch.allclose(torch.stack(states)[:, 0, 0].float(), exact, rtol=2e-3)


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"atol": -1.0}, {"times": torch.tensor([0.5, 0.5])}])
def test_unusable_tolerance_and_times_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        sample_flow_adaptive(grow, torch.ones(1), **options)


def test_missing_library_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(RefusedInputError, match="needs torchdiffeq: pip install torchdiffeq"):
        sample_flow_adaptive(grow, torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_paths_of_the_miniature_are_exact_and_go_back_to_their_start(guidance_scale: float):
    model = BaseModel(load_miniature())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts, side = ["an owl on a blue background", "a red apple"], 8 * model.downsampling
    with torch.no_grad():
        velocity = prompt_velocity(model, model.flow, prompts, side, side, guidance_scale)
        fine = sample_flow(velocity, noise, 250, method="rk4")
        adaptive = sample_flow_adaptive(velocity, noise)
        data = sample_flow(velocity, noise, 50, method="rk4")
        back = sample_flow(velocity, data, times=torch.linspace(1, 0, 51), method="rk4")
        forth = sample_flow(velocity, back, 50, method="rk4")
    assert (adaptive - fine).norm() <= 1e-3 * fine.norm()
    assert (back - noise).norm() <= 1e-3 * noise.norm()
    assert (forth - data).norm() <= 1e-3 * data.norm()
