"""Options of solvers and guidance: what has an effect, and what is refused."""

from typing import Any

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling import solver_options
from d2f_fast.sampling.solver_options import SolverOptions


@pytest.mark.parametrize("given", [
    {"guidance_interval": (0.5, 0.5)},
    {"guidance_interval": (-0.1, 0.5)},
    {"guidance_interval": (0.5, float("nan"))},
    {"rtol": 0.0},
    {"atol": 2.0},
    {"diffusion": -1.0},
], ids=str)  # fmt: skip
def test_value_outside_its_range_is_refused_by_the_name_of_its_option(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(RefusedInputError, match=name):
        SolverOptions(**given)


@pytest.mark.parametrize(
    ("given", "method", "sentence"),
    [
        ({"rtol": 1e-3}, "rk4", "rtol has no effect with the method rk4: leave it out, or give --method dopri5"),
        ({"diffusion": 1.0}, "euler", "diffusion has no effect with the method euler: .*--method euler_maruyama"),
    ],
)
def test_option_without_effect_is_refused(given: dict[str, Any], method: Any, sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        SolverOptions(**given).check(method, 3.0)


def test_interval_without_guidance_is_refused() -> None:
    SolverOptions((0.2, 0.8)).check("euler", 3.0)
    with pytest.raises(RefusedInputError, match="guidance_interval has no effect with guidance_scale 1, which turns"):
        SolverOptions((0.2, 0.8)).check("euler", 1.0)


def test_missing_package_of_the_adaptive_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_options, "find_spec", lambda name: None)
    SolverOptions().check("rk4", 1.0)
    with pytest.raises(RefusedInputError, match="needs torchdiffeq: pip install torchdiffeq"):
        SolverOptions().check("dopri5", 1.0)


def test_stock_pipelines_serve_their_methods_without_an_interval() -> None:
    methods = ("euler", "midpoint", "heun", "rk4", "dopri5", "euler_maruyama", "stochastic_heun")
    assert [SolverOptions().needs_solver(method) for method in methods] == [False] * 3 + [True] * 4
    assert SolverOptions((0.0, 0.5)).needs_solver("euler")
    assert SolverOptions((0.0, 0.5), diffusion=0.0).given() == {"guidance_interval": (0.0, 0.5), "diffusion": 0.0}
