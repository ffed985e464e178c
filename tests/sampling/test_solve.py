"""Solvers by the names of their methods, against their own functions."""

from typing import get_args

import pytest
import torch

from d2f_fast.config import FixedStepMethod, SamplingMethod, StochasticMethod
from d2f_fast.sampling.adaptive import sample_flow_adaptive
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.solve import solve
from d2f_fast.sampling.solver_options import SolverOptions
from d2f_fast.sampling.stochastic import sample_flow_stochastic

TIMES = torch.tensor([0.0, 0.3, 0.7, 1.0])


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x * t - x


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_every_method_is_that_of_its_function() -> None:
    start, given = torch.randn(2, 3), {"times": TIMES, "return_intermediates": True}
    want = {name: sample_flow(velocity, start, method=name, **given) for name in get_args(FixedStepMethod)}
    want["dopri5"] = sample_flow_adaptive(velocity, start, rtol=1e-3, atol=1e-4, **given)
    for name in get_args(StochasticMethod):
        want[name] = sample_flow_stochastic(velocity, start, method=name, diffusion=0.5, generator=seeded(), **given)
    assert want.keys() == set(get_args(SamplingMethod))
    for name, states in want.items():
        got = solve(velocity, start, TIMES, name, SolverOptions(None, 1e-3, 1e-4, 0.5), seeded())
        if name in ("midpoint", "heun"):  # The last step of diffusers' schedulers is an Euler step.
            states[-1] = states[-2] + (TIMES[-1] - TIMES[-2]) * velocity(states[-2], TIMES[-2])
        assert len(got) == 4 and all(torch.equal(*pair) for pair in zip(got, states, strict=True)), name


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "dopri5"])
def test_falling_times_lead_back(method: SamplingMethod) -> None:
    start = torch.randn(2, 3)
    there = solve(velocity, start, torch.linspace(0, 1, 101), method)[-1]
    back = solve(velocity, there, torch.linspace(1, 0, 101), method)[-1]
    torch.testing.assert_close(back, start, rtol=0, atol=5e-2 if method == "euler" else 1e-3)
