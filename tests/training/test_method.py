"""Objectives and forms that a base model does not take."""

from pathlib import Path

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.training.method import check_starting_tags, settle_method


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


def test_starting_lora_of_the_flow_needs_the_objective_and_the_form_of_the_flow() -> None:
    flow = {"d2f.prediction_type": "flow_prediction"}
    published = TrainingConfig(objective="fm", fm_form="published")
    for tags, config in ((flow, TrainingConfig(objective="diff2flow")), (flow, published)):
        with pytest.raises(ModelError, match=r"init_lora a makes .*: give --objective fm --fm_form diffusers, or"):
            check_starting_tags(Path("a"), tags, config)
    check_starting_tags(Path("a"), flow | {"d2f.fm_form": "published"}, published)
    check_starting_tags(Path("a"), {"d2f.prediction_type": "epsilon"}, published)
