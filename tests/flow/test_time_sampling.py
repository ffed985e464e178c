"""Time densities against scipy's distributions, closed-form distribution functions and diffusers' own samples."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import special, stats

from d2f_fast.flow.time_sampling import sample_times

COUNT = 20_000


def noise_levels(sampling, seed=0, **options):
    """Return s = 1 - t of seeded flow times, float64."""
    t = sample_times(COUNT, sampling, generator=torch.Generator().manual_seed(seed), **options)
    return 1 - t.double().numpy()


def u_shaped_cdf(s):
    """Return that of arXiv 2405.20320, a = 4: half has density a e^(a s) / (e^a - 1), and half is its mirror image."""
    rising, falling = (np.expm1(4 * x) / np.expm1(4) for x in (s, 1 - s))
    return (rising + 1 - falling) / 2


def logit_normal_cdf(mean, std):
    return lambda s: stats.norm.cdf(special.logit(s), mean, std)


CASES = {
    "uniform": ("uniform", {}, stats.uniform.cdf),
    "logit_normal": ("logit_normal", {}, logit_normal_cdf(0, 1)),
    "logit_normal nearer the data": (
        "logit_normal",
        {"logit_mean": -0.7, "logit_std": 0.6},
        logit_normal_cdf(-0.7, 0.6),
    ),
    "logit_normal nearer the noise": ("logit_normal", {"logit_mean": 1.0, "logit_std": 1.5}, logit_normal_cdf(1, 1.5)),
    "u_shaped": ("u_shaped", {}, u_shaped_cdf),
}


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize("case", CASES)
def test_times_follow_the_density_of_the_noise_level(case, shift):
    sampling, options, cdf = CASES[case]
    # s' = k s / (1 + (k - 1) s) keeps the order, so its distribution function is that of s at the inverse.
    result = stats.kstest(noise_levels(sampling, shift=shift, **options), lambda s: cdf(s / (shift - (shift - 1) * s)))
    assert result.pvalue > 1e-3


def test_mode_times_have_the_distribution_of_diffusers():
    expected = compute_density_for_timestep_sampling(
        "mode", 200_000, mode_scale=1.29, generator=torch.Generator().manual_seed(1)
    )
    assert stats.ks_2samp(noise_levels("mode"), expected.double().numpy()).pvalue > 1e-3
    # Another density fails the same test.
    assert stats.ks_2samp(noise_levels("uniform"), expected.double().numpy()).pvalue < 1e-6


def test_shift_equals_that_of_diffusers_flow_matching_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = noise_levels("uniform")
    scheduler.set_timesteps(sigmas=plain)
    np.testing.assert_allclose(noise_levels("uniform", shift=3.0), scheduler.sigmas[:-1].numpy(), atol=2e-7)
    sigma = plain / (1 - plain)
    shifted = noise_levels("uniform", shift=0.25)
    middle = (plain > 0.01) & (plain < 0.99)
    np.testing.assert_allclose((shifted / (1 - shifted))[middle], 0.25 * sigma[middle], rtol=3e-5)


@pytest.mark.parametrize("shift", [1e-3, 1 / 3, 1.0, 3.0, 7.0, 1e3])
@pytest.mark.parametrize("sampling", ["uniform", "mode", "u_shaped"])
def test_outermost_times_stay_within_zero_and_one(monkeypatch, sampling, shift):
    outermost = torch.tensor([0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: outermost)
    # Devices differ in the last places of asinh: here it is too large by two of them.
    asinh = torch.asinh
    monkeypatch.setattr(torch, "asinh", lambda x: asinh(x) * (1 + 2.0**-22))
    t = sample_times(len(outermost), sampling, shift=shift)
    assert t.min() >= 0 and t.max() <= 1
    assert t.max() - t.min() > 0.5


@pytest.mark.parametrize("shift", [1e-3, 1 / 3, 1.0, 3.0, 7.0, 1e3])
def test_saturated_logit_normal_ends_exactly_at_noise_and_at_data(shift):
    assert sample_times(8, "logit_normal", logit_mean=200.0, shift=shift).tolist() == [0.0] * 8
    assert sample_times(8, "logit_normal", logit_mean=-200.0, shift=shift).tolist() == [1.0] * 8


def test_times_are_float32_and_repeat_with_the_generator():
    for sampling in ("uniform", "logit_normal", "mode", "u_shaped"):
        first, again, other = (
            sample_times(5, sampling, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
        )
        assert first.dtype == torch.float32 and first.shape == (5,)
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampling": "cosmap"}, r"timestep_sampling must be one of \('uniform', .*\), got 'cosmap'"),
        ({"shift": 0.0}, r"shift and logit_std must be positive, got 0.0 and 1.0"),
        ({"shift": float("nan")}, "shift and logit_std must be positive"),
        ({"logit_std": -1.0}, "shift and logit_std must be positive, got 1.0 and -1.0"),
    ],
)
def test_unusable_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample_times(4, **options)
