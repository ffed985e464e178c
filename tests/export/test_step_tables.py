"""Tables of the sampler's steps."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from d2f_fast import Alignment
from d2f_fast.export.step_tables import step_table, trailing_table, write_tables


def test_first_step_from_pure_noise_is_finite():
    table = step_table(Alignment.from_scheduler(DDIMScheduler(beta_end=0.012, beta_schedule="scaled_linear")), 1)
    assert table.timesteps == [999.0] and table.sigmas[-1] == 0
    assert np.isfinite([*table.coef_x, *table.coef_out]).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_trailing_steps_are_those_of_ddim(prediction_type):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    for steps in (1, 4, 10):
        table = trailing_table(Alignment.from_scheduler(scheduler), steps)
        scheduler.set_timesteps(steps)
        assert table.timesteps == pytest.approx(scheduler.timesteps.tolist(), abs=1e-6)
        sample, output = torch.randn(2, 64, dtype=torch.float64)
        for i, timestep in enumerate(scheduler.timesteps):
            want = scheduler.step(output, timestep, sample).prev_sample
            got = table.coef_x[i] * sample + table.coef_out[i] * output
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
            sample = got
        assert table.sigmas[-1] == 0 and table.sigmas[0] == pytest.approx((1 - table.times[0]) / table.times[0])


def test_table_of_zero_terminal_snr_is_finite(tmp_path):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    table = trailing_table(Alignment.from_scheduler(scheduler), 2)
    assert table.times[0] == 0 and table.sigmas[0] == 4096
    write_tables(tmp_path / "steps.json", {2: table})
    assert "Infinity" not in (tmp_path / "steps.json").read_text()
