"""Objectives and forms that a base model does not take."""

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.training.method import settle_method


@pytest.mark.parametrize(
    ("own", "options", "sentence"),
    [
        (
            "diffusers",
            {"objective": "diff2flow"},
            "objective diff2flow needs a base .*no diffusion prediction to align",
        ),
        ("diffusers", {"objective": "diffusion"}, "objective diffusion needs a base .*: leave --objective out"),
        ("diffusers", {"fm_form": "published"}, "predicts the flow in the form diffusers: leave --fm_form out"),
        ("published", {"fm_form": "diffusers"}, "in the form published: leave --fm_form out"),
        ("diffusers", {"loss_weighting": "native"}, "loss_weighting must be flow with the objective fm, got native"),
        (None, {"fm_form": "published"}, "fm_form published does not go with the objective diff2flow"),
    ],
)
def test_method_that_does_not_fit_the_base_model_is_refused_in_one_line(own, options, sentence):
    with pytest.raises(RefusedInputError, match=sentence) as error:
        settle_method(TrainingConfig(**options), own)
    assert "\n" not in str(error.value)
