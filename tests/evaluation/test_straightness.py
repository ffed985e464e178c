"""Test the straightness of paths that are known in closed form."""

import math

import pytest
import torch

from d2f_fast.errors import RefusedInputError
from d2f_fast.evaluation.straightness import measure_straightness
from d2f_fast.sampling.integrate import Velocity


def test_straight_paths_measure_zero() -> None:
    direction = torch.randn(4, 3)
    found = measure_straightness(lambda x, t: direction, torch.randn(4, 3))
    assert len(found.deviation) == len(found.curvature) == len(found.step_error) == 8
    assert max(found.deviation + found.curvature + found.step_error) < 1e-5
    assert found.mean_deviation < 1e-10


def test_accelerated_paths_have_the_closed_form_in_every_segment() -> None:
    direction = torch.randn(4, 3, dtype=torch.float64)
    found = measure_straightness(lambda x, t: 2 * t * direction, torch.randn(4, 3, dtype=torch.float64), 4, 2)
    for k in range(4):
        low, high = k / 4, (k + 1) / 4
        exact = ((2 * high - 1) ** 3 - (2 * low - 1) ** 3) / 6 / (high - low)
        assert found.deviation[k] == pytest.approx(exact, rel=1e-5)
        assert found.curvature[k] == pytest.approx(2, rel=1e-5)
        assert found.step_error[k] == pytest.approx((high - low) / (high + low), rel=1e-5)
    assert found.mean_deviation == pytest.approx(1 / 3, rel=1e-5)


def test_rotation_has_the_curvature_of_a_circle() -> None:
    angle = math.pi / 2
    turn = angle * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    found = measure_straightness(lambda x, t: x @ turn, torch.randn(50, 2, dtype=torch.float64), 2, 32)
    # A quarter of a circle: the velocity angle * r turns at the rate `angle`, and the chord is sqrt(2) r.
    assert found.curvature == pytest.approx([angle**2 / math.sqrt(2)] * 2, rel=1e-3)
    # |v|² - 2 v · chord + |chord|², whose middle term is twice |chord|² in the mean over the path.
    assert found.mean_deviation == pytest.approx(angle**2 / 2 - 1, rel=1e-5)


@pytest.mark.parametrize(
    ("velocity", "sentence"),
    [
        (lambda x, t: torch.zeros_like(x), "end where they begin, so that their straightness is not defined"),
        (lambda x, t: torch.full_like(x, math.nan), "the paths of the model hold NaN or infinity: check its predict"),
        (lambda x, t: torch.full_like(x, math.inf), "the paths of the model hold NaN or infinity"),
        (lambda x, t: torch.full_like(x, float(t < 0.5)), "do not move in part 2 of 2 of flow time"),
    ],
)
def test_paths_without_a_length_are_refused(velocity: Velocity, sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        measure_straightness(velocity, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), 2, 2)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 3), (8, 0)])
def test_unusable_segments_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="segments must be at least 1 and steps_per_segment even"):
        measure_straightness(lambda x, t: x, torch.zeros(1, 1), *sizes)
