"""Options of the base model: the words that they take."""

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.models.options import ModelOptions


def test_unknown_prediction_type_is_refused_with_the_words_that_the_option_takes() -> None:
    with pytest.raises(RefusedInputError, match="prediction_type must be epsilon, v_prediction, sample or flow_pred"):
        ModelOptions(prediction_type="score")  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction_type", [None, "epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_type_is_accepted(prediction_type) -> None:
    assert ModelOptions(prediction_type=prediction_type).prediction_type == prediction_type
