"""Test the tuned settings that the package ships."""

from d2f_fast.demo.samplers import SAMPLERS
from d2f_fast.demo.settings import TunedSettings


def test_tuned_settings_hold_a_rate_and_a_sampler_for_each_network() -> None:
    tuned = TunedSettings.read()
    assert set(tuned.learning_rate) == set(tuned.sampler) == {"diff2flow", "fm", "fm_paper", "diffusion"}
    assert all(1e-5 < rate < 1e-1 for rate in tuned.learning_rate.values())
    assert all(sampler in SAMPLERS for sampler in tuned.sampler.values())
