"""`Diff2FlowScheduler` in exchange for each scheduler of diffusers, and back: no option of either may change."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from d2f_fast.sampling.scheduler import Diff2FlowScheduler

TABLE = {"num_train_timesteps": 500, "beta_start": 0.0007, "beta_end": 0.013, "beta_schedule": "scaled_linear"}


def options_of(stock: type[SchedulerMixin]) -> set[str]:
    return set(inspect.signature(stock.__init__).parameters) - {"self", "kwargs"}


def stock_schedulers() -> list[type[SchedulerMixin]]:
    """Return every scheduler of diffusers that has a noise table or samples a flow with a shift."""
    found = []
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            stock = getattr(diffusers, name)
            options = options_of(stock)
            if "beta_schedule" in options or ("shift" in options and "prediction_type" not in options):
                found.append(stock)
    return found


def made(stock: type[SchedulerMixin], **options: Any) -> SchedulerMixin:
    """Return a scheduler, or skip the test where its class lacks a library that is not installed."""
    try:
        return stock(**options)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


@pytest.mark.parametrize("given", [{}, TABLE], ids=["defaults", "table"])
@pytest.mark.parametrize("stock", stock_schedulers(), ids=lambda stock: stock.__name__)
def test_round_trip_leaves_a_stock_scheduler_as_it_was(stock: type[SchedulerMixin], given: dict[str, Any]) -> None:
    own = options_of(stock)
    given = {name: value for name, value in given.items() if name in own and ("beta_start" in own or "num" in name)}
    before = made(stock, **given)
    ours = Diff2FlowScheduler.from_config(before.config)
    after = stock.from_config(ours.config)
    names = options_of(stock)
    assert {name: after.config[name] for name in names} == {name: before.config[name] for name in names}
    # What the scheduler took by default stays a default, except for what describes the model.
    kept = set(before.config.get("_use_default_values", ())) - set(after.config.get("_use_default_values", ()))
    assert kept <= {*TABLE, "trained_betas", "prediction_type", "rescale_betas_zero_snr", "shift"}


def test_round_trip_leaves_options_of_a_scheduler_as_they_were() -> None:
    before = EulerDiscreteScheduler(timestep_spacing="trailing", use_karras_sigmas=True, steps_offset=1)
    after = EulerDiscreteScheduler.from_config(Diff2FlowScheduler.from_config(before.config, shift=2.0).config)
    assert all(after.config[name] == before.config[name] for name in options_of(EulerDiscreteScheduler))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PNDMScheduler, EulerDiscreteScheduler),
        (DEISMultistepScheduler, DPMSolverMultistepScheduler),
        (EulerDiscreteScheduler, EDMEulerScheduler),
    ],
    ids=lambda stock: stock.__name__,
)
def test_exchange_by_way_of_ours_equals_the_direct_one(
    first: type[SchedulerMixin], second: type[SchedulerMixin]
) -> None:
    ours = Diff2FlowScheduler.from_config(first(**TABLE).config)
    direct, indirect = second.from_config(first(**TABLE).config), second.from_config(ours.config)
    for each in (direct, indirect):
        each.set_timesteps(4)
    assert torch.equal(indirect.timesteps, direct.timesteps)
    names = options_of(second)
    assert {name: indirect.config[name] for name in names} == {name: direct.config[name] for name in names}


def test_noise_table_of_our_defaults_reaches_other_schedulers() -> None:
    ours = Diff2FlowScheduler()
    stock = EulerDiscreteScheduler.from_config(ours.config)
    assert stock.config.beta_schedule == "scaled_linear"
    assert torch.equal(stock.alphas_cumprod, ours.alphas_cumprod)


def test_default_shift_of_a_flow_scheduler_is_kept() -> None:
    config = dict(FlowMatchEulerDiscreteScheduler().config) | {"shift": 3.0}
    assert "shift" in config["_use_default_values"]
    assert Diff2FlowScheduler.from_config(config).config.shift == 3.0
