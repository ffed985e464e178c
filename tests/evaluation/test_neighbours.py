"""Test precision, recall and coverage against their definitions, written as loops, and closed cases."""

import numpy as np
import pytest

from d2f_fast.evaluation import neighbours
from d2f_fast.evaluation.neighbours import compare_neighbourhoods


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float]:
    """Return precision, recall and coverage from the papers' formulas, one image at a time."""

    def radius(features: np.ndarray, i: int) -> float:
        others = np.delete(features, i, axis=0)
        return float(np.sort(np.linalg.norm(others - features[i], axis=1))[k - 1])

    def is_within(point: np.ndarray, centres: np.ndarray, radii: list[float]) -> bool:
        return any(np.linalg.norm(point - c) <= r for c, r in zip(centres, radii, strict=True))

    of_real = [radius(real, i) for i in range(len(real))]
    of_generated = [radius(generated, i) for i in range(len(generated))]
    precision = np.mean([is_within(point, real, of_real) for point in generated])
    recall = np.mean([is_within(point, generated, of_generated) for point in real])
    coverage = np.mean(
        [
            any(np.linalg.norm(point - centre) <= r for point in generated)
            for centre, r in zip(real, of_real, strict=True)
        ]
    )
    return float(precision), float(recall), float(coverage)


@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (3, 0.8), (5, 2.0)])
def test_fractions_equal_the_definitions(k: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", 7)  # The blocks do not divide the sets.
    generator = np.random.default_rng(0)
    real, generated = generator.standard_normal((40, 3)), 0.7 * generator.standard_normal((30, 3)) + shift
    found = compare_neighbourhoods(real, generated, k)
    assert (found.precision, found.recall, found.coverage) == pytest.approx(by_definition(real, generated, k))
    assert 0 < found.coverage < 1


def test_equal_sets_cover_each_other_and_distant_sets_do_not() -> None:
    features = np.random.default_rng(1).standard_normal((30, 4))
    same, far = compare_neighbourhoods(features, features), compare_neighbourhoods(features, features + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.coverage) == (0, 0, 0)


def test_missing_mode_lowers_recall_and_not_precision() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.standard_normal((2, 100, 2))
    found = compare_neighbourhoods(np.concatenate([first, second + 50]), generator.standard_normal((200, 2)))
    assert found.precision > 0.9 and found.recall <= 0.5 and found.coverage <= 0.5


@pytest.mark.parametrize(
    ("real", "generated", "k", "sentence"),
    [((9, 2), (9, 3), 5, "features must be"), ((9,), (9, 3), 5, "features must be"), ((9, 2), (5, 2), 5, "k must be")],
)
def test_unusable_features_are_refused(
    real: tuple[int, ...], generated: tuple[int, ...], k: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        compare_neighbourhoods(np.zeros(real), np.zeros(generated), k)
