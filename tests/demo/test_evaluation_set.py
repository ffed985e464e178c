"""Test the division of the captions and the entries that the evaluation set measures."""

import pytest

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import Classifier


def test_evaluation_set_measures_its_own_captions_and_refuses_too_many() -> None:
    names = sorted(emoji.held_out_names())[:10]
    evaluation_set = EvaluationSet(names, 30, Classifier().eval(), "fluent", repeats=10)
    measured = evaluation_set.measure(evaluation_set.real)
    assert measured["samples"] == 30
    assert len(set(evaluation_set.items)) == 30
    assert measured["frechet_low"] <= measured["frechet_distance"] <= measured["frechet_high"]
    assert evaluation_set.measure(evaluation_set.real.flip(1))["frechet_distance"] > measured["frechet_distance"]
    shown = [evaluation_set.items[i].colour for i in evaluation_set.one_of_each_colour()]
    assert len(shown) == len(set(shown)) == len({item.colour for item in evaluation_set.items})
    with pytest.raises(ValueError, match="count must be 2 to 78 for 10 names"):
        EvaluationSet(names, 79, Classifier().eval(), "fluent")
