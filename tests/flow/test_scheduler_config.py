"""What the configuration of a scheduler states about the flow."""

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from d2f_fast.flow.scheduler_config import form_of_config, predicts_flow


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
