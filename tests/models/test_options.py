"""Options of the base model: the words that they take."""

from pathlib import Path

import pytest

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.options import ModelOptions, check_model


def test_unknown_prediction_type_is_refused_with_the_words_that_the_option_takes() -> None:
    with pytest.raises(RefusedInputError, match="prediction_type must be epsilon, v_prediction, sample or flow_pred"):
        ModelOptions(prediction_type="score")  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction_type", [None, "epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_type_is_accepted(prediction_type) -> None:
    assert ModelOptions(prediction_type=prediction_type).prediction_type == prediction_type


@pytest.mark.parametrize("stated", [True, False])
def test_noise_schedule_of_a_flow_is_refused(stated: bool) -> None:
    with pytest.raises(RefusedInputError, match="rescale_betas_zero_snr has no effect with prediction_type flow_pred"):
        ModelOptions(prediction_type="flow_prediction", rescale_betas_zero_snr=stated)
    assert ModelOptions(prediction_type="v_prediction", rescale_betas_zero_snr=stated).rescale_betas_zero_snr == stated


def test_tokenizer_is_an_option_of_single_files(tmp_path: Path) -> None:
    options = ModelOptions(tokenizer_name_or_path="somewhere")
    for model in ("miniature", "owner/name", tmp_path):
        with pytest.raises(ModelError, match=r"has a tokenizer of its own: leave tokenizer_name_or_path out"):
            check_model(model, options)
    (tmp_path / "a.safetensors").touch()
    check_model(tmp_path / "a.safetensors", options)
