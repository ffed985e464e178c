"""Noise schedules: reading them from diffusers' schedulers, and the tables that are refused."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from d2f_fast.errors import ModelError
from d2f_fast.flow.noise_schedule import NoiseSchedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_all_schedulers_of_a_zero_snr_model_give_the_same_table():
    # DDIM keeps the terminal zero; Euler and DPM-Solver store 2⁻²⁴ in its place.
    options = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedules = [
        NoiseSchedule.from_scheduler(source(**options))
        for source in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
    ]
    for schedule in schedules:
        assert schedule.zero_terminal_snr and schedule.flow_times()[-1] == 0
        assert torch.equal(schedule.alphas_cumprod, schedules[0].alphas_cumprod)
    assert not NoiseSchedule.from_scheduler(DDIMScheduler(**SD)).zero_terminal_snr


def test_later_changes_of_the_scheduler_do_not_change_the_table():
    scheduler = DDIMScheduler(**SD)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    before = schedule.flow_times()
    scheduler.alphas_cumprod.zero_()
    assert torch.equal(schedule.flow_times(), before) and before[0] > 0.97


def test_flow_matching_scheduler_is_refused_by_name():
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ([[0.9, 0.5], [0.8, 0.4]], r"must have shape \[T\] with T >= 2, got \(2, 2\)"),
        ([0.9], r"must have shape \[T\] with T >= 2, got \(1,\)"),
        ([0.5, 0.9], "must decrease strictly within"),
        ([0.9, 0.5, 0.5], "must decrease strictly within"),
        ([1.0, 0.5], "must decrease strictly within"),
        ([0.9, 0.5, -0.1], "must decrease strictly within"),
        ([0.9, 0.0, 0.0], "must decrease strictly within"),
        ([0.9, float("nan"), 0.1], "must decrease strictly within"),
        ([0.9, 0.5, float("nan")], "must decrease strictly within"),
        ([0.9, 0.5, 0.5 - 1e-9], "must decrease strictly within"),  # two values in float64, one in float32
    ],
)
def test_unusable_tables_are_refused(table, sentence):
    with pytest.raises(ModelError, match=sentence):
        NoiseSchedule(torch.tensor(table, dtype=torch.float64), "v_prediction")


def test_flow_prediction_is_refused():
    with pytest.raises(ModelError, match=r"prediction_type is flow_prediction: the network predicts the flow itself"):
        NoiseSchedule(torch.tensor([0.9, 0.5]), "flow_prediction")
