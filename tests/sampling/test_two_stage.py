"""`TwoStageSteps` against float64 steps of the textbook, for a network whose output is known in closed form."""

import pytest
import torch
from torch import Tensor

from d2f_fast.config import Method
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.sampling.two_stage import TwoStageSteps

METHODS: tuple[Method, Method] = ("midpoint", "heun")
NODES = torch.tensor([0, 0.3, 0.5, 1], dtype=torch.float64)


def velocity(x_t: Tensor, t: float) -> Tensor:
    return 0.5 * x_t - t**2


def by_textbook(x_t: Tensor, method: Method) -> Tensor:
    """Return the end of two steps of a method and an Euler step."""
    for t, t_next in ((0.0, 0.3), (0.3, 0.5)):
        h, first = t_next - t, velocity(x_t, t)
        if method == "midpoint":
            x_t = x_t + h * velocity(x_t + h / 2 * first, t + h / 2)
        else:
            x_t = x_t + h / 2 * (first + velocity(x_t + h * first, t_next))
    return x_t + 0.5 * velocity(x_t, 0.5)


def run(steps: TwoStageSteps, sample: Tensor, copies: int | None) -> Tensor:
    """Return the end of a run in which the network takes `copies` of its input; None leaves `network_input` out."""
    for index, t in enumerate(steps.times.tolist()):
        given = sample if copies is None else steps.network_input(index, torch.cat([sample] * copies))[: len(sample)]
        sample, seen = steps.step(index, -velocity(given, t), sample)
        assert torch.equal(seen, given)
    return sample


@pytest.mark.parametrize("copies", [None, 1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_textbook_with_and_without_a_scaled_input(method: Method, copies: int | None) -> None:
    noise = torch.randn(2, 4, 8, 8)
    got = run(TwoStageSteps(NaiveFlow(1000), method, NODES), noise, copies)
    assert (got - by_textbook(noise.double(), method)).abs().max() < 1e-6


@pytest.mark.parametrize(("method", "second"), [("midpoint", [0.15, 0.4]), ("heun", [0.3, 0.5])])
def test_every_step_but_the_last_has_a_second_evaluation(method: Method, second: list[float]) -> None:
    times = TwoStageSteps(NaiveFlow(1000), method, NODES).times
    torch.testing.assert_close(times[::2], NODES[:-1].float())
    torch.testing.assert_close(times[1::2], torch.tensor(second))


@pytest.mark.parametrize("method", METHODS)
def test_another_run_goes_on_after_every_evaluation(method: Method) -> None:
    """The state after the first evaluation of a step is that of its start, where the other run begins again."""
    flow: Flow = Diff2FlowScheduler().flow
    noise = torch.randn(2, 4, 8, 8)

    def evaluate(steps: TwoStageSteps, indices: range, sample: Tensor) -> Tensor:
        for index in indices:
            given = steps.network_input(index, sample)
            sample, _ = steps.step(index, given.sin() + steps.times[index], sample)
        return sample

    whole = evaluate(TwoStageSteps(flow, method, NODES), range(5), noise)
    for first in range(1, 5):
        half = evaluate(TwoStageSteps(flow, method, NODES), range(first), noise)
        rest = range(first - first % 2, 5)
        assert torch.equal(evaluate(TwoStageSteps(flow, method, NODES), rest, half), whole)


def test_input_with_further_channels_is_left_as_it_is() -> None:
    """A pipeline that scales the latents together with an image gets the state of the second evaluation."""
    steps, noise = TwoStageSteps(NaiveFlow(1000), "midpoint", NODES), torch.randn(1, 4, 8, 8)
    sample = noise
    for index, t in enumerate(steps.times.tolist()):
        wide = torch.cat([sample, torch.zeros_like(sample)], 1)
        assert steps.network_input(index, wide) is wide
        sample, _ = steps.step(index, -velocity(sample, t), sample)
    assert (sample - by_textbook(noise.double(), "midpoint")).abs().max() < 1e-6


def test_state_within_a_step_is_that_of_its_start() -> None:
    steps, sample = TwoStageSteps(NaiveFlow(1000), "midpoint", NODES), torch.zeros(1, 4, 8, 8)
    assert steps.state_time(0) == 0 and steps.state_time(2) == NODES[1].float()
    steps.network_input(0, sample)
    steps.step(0, sample, sample)
    assert steps.state_time(1) == 0
    unscaled = TwoStageSteps(NaiveFlow(1000), "midpoint", NODES)
    unscaled.step(0, sample, sample)
    assert unscaled.state_time(1) == torch.tensor(0.15)
