"""The three objectives against diffusers' own training code: add_noise, get_velocity, scale_noise and a plain MSE."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from scipy import special, stats
from torch.nn.functional import mse_loss

from d2f_fast.config import TrainingConfig
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.training.method import settle_method
from d2f_fast.training.objective import Objective, method_line, min_snr_weight

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
TIMESTEPS = torch.tensor([0, 1, 40, 261, 500, 760, 998, 999])


def operands():
    return torch.randn(3, len(TIMESTEPS), 4, 8, 8)


def assert_close(got, expected, tolerance):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def diffusion_target(scheduler, latents, noise):
    """Return the target of the diffusers training scripts."""
    return {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(latents, noise, TIMESTEPS),
        "sample": latents,
    }[scheduler.config.prediction_type]


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_diffusion_objective_is_the_loss_of_the_diffusers_scripts(prediction_type, zero_snr):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    alignment = Alignment.from_scheduler(scheduler)
    # The flow's weighting and density belong to the other objectives; a diffusion run must not change with them.
    objective = Objective("diffusion", alignment, weighting="flow", flow_shift=3.0)
    latents, noise, output = operands()
    t = alignment.flow_time(TIMESTEPS)
    sample, timestep = objective.inputs(latents, noise, t)
    assert torch.equal(timestep, TIMESTEPS.float())
    assert_close(sample, scheduler.add_noise(latents, noise, TIMESTEPS), 1e-6)
    target = diffusion_target(scheduler, latents, noise)
    assert_close(objective.loss(output, latents, noise, t), mse_loss(output, target), 1e-6)
    per_sample = objective.loss(output, latents, noise, t, reduction="none")
    # 1 - t carries the rounding of t: 6e-8 of it at the data end, where 1 - t is 0.03.
    assert_close(per_sample, (output - target).square().mean((1, 2, 3)), 1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_aligned_objective_is_the_flow_loss_of_what_ddim_reads_from_the_output(prediction_type):
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, set_alpha_to_one=True)
    alignment = Alignment.from_scheduler(scheduler)
    latents, noise, output = operands()
    sample = scheduler.add_noise(latents, noise, TIMESTEPS)
    scheduler.set_timesteps(1000)
    expected = []
    for i, timestep in enumerate(TIMESTEPS):
        x0 = scheduler.step(output[i], timestep, sample[i]).pred_original_sample
        alpha, sigma = (scheduler.alphas_cumprod[timestep]).sqrt(), (1 - scheduler.alphas_cumprod[timestep]).sqrt()
        velocity = x0 - (sample[i] - alpha * x0) / sigma
        expected.append((velocity - (latents[i] - noise[i])).square().mean())
    got = Objective("diff2flow", alignment).loss(
        output, latents, noise, alignment.flow_time(TIMESTEPS), reduction="none"
    )
    torch.testing.assert_close(got, torch.stack(expected), rtol=2e-4, atol=0)  # x̂0 / sigma at timestep 0 in float32


@pytest.mark.parametrize("snr_gamma", [1.0, 20.0])
def test_min_snr_weighs_the_flow_loss_with_diffusers_snr(snr_gamma):
    scheduler = DDPMScheduler(**SD)
    alignment = Alignment.from_scheduler(scheduler)
    latents, noise, output = operands()
    t = alignment.flow_time(TIMESTEPS)
    flow = Objective("diff2flow", alignment).loss(output, latents, noise, t, reduction="none")
    weighted = Objective("diff2flow", alignment, weighting="min_snr", snr_gamma=snr_gamma)
    snr = compute_snr(scheduler, TIMESTEPS)
    expected = flow * snr.clamp(max=snr_gamma) / snr
    torch.testing.assert_close(weighted.loss(output, latents, noise, t, reduction="none"), expected, rtol=1e-5, atol=0)


def test_naive_objective_is_the_loss_of_diffusers_flow_matching_scripts():
    scheduler = FlowMatchEulerDiscreteScheduler()
    objective = Objective("fm", Alignment.from_scheduler(DDPMScheduler(**SD)))
    latents, noise, output = operands()
    sigmas = torch.linspace(0.9, 0.01, len(TIMESTEPS))
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    sample, timestep = objective.inputs(latents, noise, 1 - sigmas)
    assert_close(timestep, scheduler.timesteps, 1e-6)
    assert_close(sample, scheduler.scale_noise(latents, scheduler.timesteps, noise), 1e-6)
    assert_close(objective.loss(output, latents, noise, 1 - sigmas), mse_loss(output, noise - latents), 1e-6)
    assert isinstance(objective.flow, NaiveFlow)


def test_published_naive_objective_is_fed_flow_time_and_learns_latents_minus_noise():
    objective = Objective("fm", Alignment.from_scheduler(DDPMScheduler(**SD)), fm_form="published")
    latents, noise, output = operands()
    output.requires_grad_()
    t = torch.linspace(0, 1, len(TIMESTEPS))
    sample, timestep = objective.inputs(latents, noise, t)
    assert torch.equal(timestep, t)
    assert_close(sample, t[:, None, None, None] * latents + (1 - t)[:, None, None, None] * noise, 1e-6)
    expected = mse_loss(output, latents - noise)
    (gradient,) = torch.autograd.grad(expected, output)
    loss = objective.loss(output, latents, noise, t)
    assert_close(loss, expected, 1e-6)
    assert_close(torch.autograd.grad(loss, output)[0], gradient, 1e-6)


def test_base_that_predicts_the_flow_keeps_its_own_flow():
    flow = NaiveFlow(500, "published")
    assert Objective("fm", flow).flow is flow
    with pytest.raises(ValueError, match='objective must be "fm" where the base model predicts the flow, got \'diff'):
        Objective("diff2flow", flow)


DIFFUSION = Alignment.from_scheduler(DDPMScheduler(**SD))


@pytest.mark.parametrize(
    ("base", "options", "settled"),
    [
        (DIFFUSION, {}, ("diff2flow", None)),
        (DIFFUSION, {"objective": "diffusion"}, ("diffusion", None)),
        (DIFFUSION, {"objective": "fm"}, ("fm", "diffusers")),
        (DIFFUSION, {"objective": "fm", "fm_form": "published"}, ("fm", "published")),
        (NaiveFlow(), {}, ("fm", "diffusers")),
        (NaiveFlow(), {"objective": "fm"}, ("fm", "diffusers")),
        (NaiveFlow(form="published"), {}, ("fm", "published")),
    ],
)
def test_base_model_settles_the_objective_that_is_left_open(base, options, settled):
    form = base.form if isinstance(base, NaiveFlow) else None
    config = settle_method(TrainingConfig(**options), form)
    assert (config.objective, config.fm_form) == settled
    assert settle_method(config, form) == config
    line = method_line(config, base)
    assert line.startswith(f"objective {settled[0]}: ") and line.endswith(f"predicts {base.prediction_type}")
    assert ("fed t," in line) == (settled[1] == "published")


def test_a_mask_restricts_every_objective_to_its_elements():
    alignment = Alignment.from_scheduler(DDPMScheduler(**SD))
    latents, noise, output = operands()
    t = alignment.flow_time(TIMESTEPS)
    mask = torch.zeros(len(TIMESTEPS), 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    for name in ("diff2flow", "fm", "diffusion"):
        objective = Objective(name, alignment)
        left = objective.loss(output[..., :4], latents[..., :4], noise[..., :4], t)
        torch.testing.assert_close(objective.loss(output, latents, noise, t, mask=mask), left)


def test_diffusion_times_are_the_table_nodes_and_equally_likely():
    alignment = Alignment.from_scheduler(DDPMScheduler(**SD))
    t = Objective("diffusion", alignment).sample_times(100_000, torch.Generator().manual_seed(0))
    timestep = alignment.timestep(t)
    assert t.dtype == torch.float32 and torch.equal(timestep, timestep.round())
    counts = torch.bincount(timestep.long(), minlength=1000)
    assert len(counts) == 1000 and stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["diff2flow", "fm"])
def test_flow_times_follow_the_density_and_shift_of_the_objective(name):
    alignment = Alignment.from_scheduler(DDPMScheduler(**SD))
    options = {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8, "flow_shift": 2.0}
    t = Objective(name, alignment, **options).sample_times(20_000, torch.Generator().manual_seed(0))
    s = 1 - t.double().numpy()
    expected = stats.norm(0.5, 0.8)
    assert stats.kstest(s, lambda s: expected.cdf(special.logit(s / (2 - s)))).pvalue > 1e-3


def test_unusable_objectives_are_refused():
    alignment = Alignment.from_scheduler(DDPMScheduler(**SD))
    with pytest.raises(ValueError, match=r"objective must be one of \('diff2flow', 'fm', 'diffusion'\), got 'flow'"):
        Objective("flow", alignment)
    latents, noise, output = operands()
    t = alignment.flow_time(TIMESTEPS)
    with pytest.raises(ValueError, match='"min_snr" needs a diffusion prediction'):
        Objective("fm", alignment, weighting="min_snr").loss(output, latents, noise, t)
    with pytest.raises(ValueError, match="timestep_sampling must be one of"):
        Objective("diff2flow", alignment, timestep_sampling="cubic").sample_times(2)


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@pytest.mark.parametrize("snr_gamma", [1.0, 5.0])
def test_diffusion_with_min_snr_is_the_loss_of_diffusers_script(prediction_type, snr_gamma, zero_snr):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    alignment = Alignment.from_scheduler(scheduler)
    latents, noise, output = operands()
    # The lines of examples/text_to_image/train_text_to_image.py, in float64.
    wide_latents, wide_noise = latents.double(), noise.double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    target = wide_noise if prediction_type == "epsilon" else scheduler.get_velocity(wide_latents, wide_noise, TIMESTEPS)
    snr = compute_snr(scheduler, TIMESTEPS).double()
    weights = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if prediction_type == "epsilon" else weights / (snr + 1)
    each = mse_loss(output.double(), target, reduction="none").mean(dim=[1, 2, 3]) * weights
    objective = Objective("diffusion", alignment, weighting="min_snr", snr_gamma=snr_gamma)
    t = alignment.flow_time(TIMESTEPS)
    got = objective.loss(output, latents, noise, t, reduction="none")
    torch.testing.assert_close(got, each.float(), rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(objective.loss(output, latents, noise, t), each.mean().float(), rtol=2e-5, atol=0)


def test_min_snr_weighs_the_error_of_the_clean_latents_alike_for_every_prediction():
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    alpha, sigma = t / (t**2 + (1 - t) ** 2).sqrt(), (1 - t) / (t**2 + (1 - t) ** 2).sqrt()
    # x̂0 = (sample - sigma ε) / alpha = alpha sample - sigma v
    per_error = {"epsilon": (sigma / alpha) ** 2, "v_prediction": sigma**2, "sample": torch.ones_like(t)}
    for prediction_type, factor in per_error.items():
        flow = Alignment.from_scheduler(DDPMScheduler(**SD, prediction_type=prediction_type))
        want = (alpha / sigma).square().clamp(max=5) * factor
        torch.testing.assert_close(min_snr_weight(t, flow, 5.0), want, rtol=1e-12, atol=0)
