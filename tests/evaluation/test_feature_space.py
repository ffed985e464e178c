"""Test the feature space against distances computed in the known subspace."""

import numpy as np
import pytest
import torch

from d2f_fast.evaluation.distances import frechet_distance
from d2f_fast.evaluation.feature_space import MOST_FEATURES, FeatureSpace, principal_directions


def test_feature_space_keeps_the_principal_directions_of_the_real_images() -> None:
    """Real images differ in 64 of 200 directions: all of these are kept, and a difference in another one is ignored."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))[0]
    real = torch.randn(300, MOST_FEATURES, generator=generator, dtype=torch.float64) @ basis[:MOST_FEATURES]
    images = torch.randn(80, MOST_FEATURES, generator=generator, dtype=torch.float64) @ basis[:MOST_FEATURES] + 0.1
    space = FeatureSpace(lambda x: x, real[:100], real[100:], seed=0)
    expected = frechet_distance(images @ basis[:MOST_FEATURES].T, real[100:] @ basis[:MOST_FEATURES].T)
    measured = space.measure(images, repeats=5)
    assert measured["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert space.measure(images + 5 * basis[-1], 5)["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert 0 < measured["frechet_floor"] < expected


def test_few_features_are_kept_as_they_are_and_few_images_give_few_directions() -> None:
    random = np.random.default_rng(0)
    assert np.array_equal(principal_directions(random.normal(size=(9, 4))), np.eye(4))
    features = random.normal(size=(10, 200))
    centred = features - features.mean(0)
    directions = principal_directions(features)
    assert np.allclose(centred @ directions @ directions.T, centred)
