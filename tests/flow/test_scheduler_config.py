"""What the configuration of a scheduler states about the flow."""

import inspect

import diffusers
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from d2f_fast.errors import ModelError
from d2f_fast.flow.scheduler_config import check_zero_snr, form_of_config, has_zero_snr, predicts_flow


@pytest.mark.parametrize(
    ("scheduler", "is_flow"),
    [
        (FlowMatchEulerDiscreteScheduler(), True),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), True),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), True),
        (EulerDiscreteScheduler(prediction_type="flow_prediction"), True),
        (EulerDiscreteScheduler(), False),
        (DDIMScheduler(prediction_type="v_prediction"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_configuration_says_whether_the_network_predicts_the_flow(scheduler, is_flow):
    assert predicts_flow(scheduler.config) == is_flow


def test_form_of_the_flow_is_read_from_the_configuration():
    flow = {"prediction_type": "flow_prediction"}
    assert form_of_config({"prediction_type": "epsilon", "fm_form": "published"}) is None
    assert [form_of_config(flow | form) for form in ({}, {"fm_form": "published"})] == ["diffusers", "published"]


def test_zero_snr_is_seen_for_every_scheduler_that_has_it():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    seen = {name for name in names if has_zero_snr({"_class_name": name, "rescale_betas_zero_snr": True})}
    taking = {
        name
        for name in names
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name).__init__).parameters
    }
    assert seen == taking and len(seen) > 10
    assert not has_zero_snr({"_class_name": "DDIMScheduler"})


def test_noise_cannot_be_predicted_from_pure_noise():
    for prediction_type, zero_snr in (("epsilon", False), ("v_prediction", True), ("sample", True)):
        check_zero_snr(prediction_type, zero_snr)
    with pytest.raises(ModelError, match=r"zero terminal SNR: .*--no_rescale_betas_zero_snr\), or use a v-prediction"):
        check_zero_snr("epsilon", True)
