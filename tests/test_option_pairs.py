"""Pairs of training options: each acts, or is refused with what to change."""

import math

import pytest

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"objective": "fm", "loss_weighting": "native"},
            "loss_weighting must be flow with the objective fm, got native: leave it out",
        ),
        (
            {"objective": "diffusion", "loss_weighting": "flow"},
            "loss_weighting must be native or min_snr with the objective diffusion, got flow: leave it out",
        ),
        (
            {"objective": "diffusion", "flow_shift": 2.5},
            "flow_shift must be 1.0 with the objective diffusion, got 2.5: leave it out, or give --sampling_shift",
        ),
        (
            {"objective": "diffusion", "timestep_sampling": "mode"},
            "timestep_sampling must be uniform with the objective diffusion, got mode: leave it out",
        ),
        (
            {"objective": "diff2flow", "fm_form": "published"},
            "fm_form published does not go with the objective diff2flow: add --objective fm, or leave fm_form out",
        ),
        ({"snr_gamma": 5.0, "objective": "fm"}, "snr_gamma does not go with the objective fm"),
        ({"snr_gamma": 5.0, "loss_weighting": "flow"}, "snr_gamma works only with loss_weighting min_snr, got flow"),
        ({"snr_gamma": 3.0, "loss_weighting": "native"}, "snr_gamma works only with loss_weighting min_snr, got nat"),
        ({"logit_mean": 0.5}, "logit_mean works only with timestep_sampling logit_normal, got uniform: add"),
        ({"logit_mean": 0.0}, "logit_mean works only with timestep_sampling logit_normal, got uniform: add"),
        ({"logit_std": 1.0, "timestep_sampling": "mode"}, "logit_std works only with timestep_sampling logit_normal"),
        ({"lr_warmup_steps": 4}, "lr_warmup_steps has no effect with lr_scheduler constant, got 4: add --lr_scheduler"),
        ({"lr_scheduler": "constant_with_warmup"}, "lr_scheduler constant_with_warmup needs the length of the warm-up"),
        ({"adapter": "full", "init_lora": "x"}, "init_lora needs --adapter lora: leave init_lora out, or merge"),
        ({"adapter": "full", "rank": 64}, "rank needs --adapter lora: leave rank out"),
        ({"adapter": "full", "lora_alpha": 1.0}, "lora_alpha needs --adapter lora: leave lora_alpha out"),
        ({"adapter": "full", "conv_rank": 4}, "conv_rank needs --adapter lora: leave conv_rank out"),
        ({"adapter": "full", "first_last_layers": True}, "first_last_layers needs --adapter lora: leave first_last"),
        ({"adapter": "full", "target_modules": ("to_q",)}, "target_modules needs --adapter lora: leave target_modules"),
        ({"adapter": "full", "lora_format": "both"}, "lora_format needs --adapter lora: leave lora_format out"),
        ({"center_crop": False}, "cache_latents needs center_crop"),
    ],
    ids=str,
)
def test_void_option_is_refused_with_the_cure(options, sentence):
    with pytest.raises(RefusedInputError) as error:
        TrainingConfig(**options)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "fm", "fm_form": "published", "flow_shift": 2.5, "sampling_shift": 6.0},
        {"objective": "fm", "loss_weighting": "flow"},
        {"objective": "diffusion", "sampling_shift": 3.0, "flow_shift": 1.0, "timestep_sampling": "uniform"},
        {"objective": "diffusion", "loss_weighting": "native"},
        {"objective": "diffusion", "snr_gamma": 5.0},
        {"objective": "diffusion", "loss_weighting": "min_snr"},
        {"snr_gamma": 5.0},
        {"snr_gamma": 3.0, "loss_weighting": "min_snr"},
        {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8},
        {"lr_scheduler": "constant", "lr_warmup_steps": 0},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 4},
        {"adapter": "full", "conv_rank": 0},
        {"center_crop": False, "cache_latents": False},
    ],
    ids=str,
)
def test_options_that_act_together_are_accepted(options):
    config = TrainingConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_gamma_that_is_not_a_positive_number_is_refused(gamma):
    with pytest.raises(RefusedInputError, match="snr_gamma must be positive and finite"):
        TrainingConfig(snr_gamma=gamma)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"objective": "diffusion"}, "distill does not go with the objective diffusion"),
        ({"timestep_sampling": "mode"}, "timestep_sampling has no effect with distill, .*, got mode: leave it out"),
        ({"flow_shift": 2.0}, "flow_shift has no effect with distill"),
        ({"loss_weighting": "native"}, "loss_weighting has no effect with distill"),
        ({"snr_gamma": 5.0}, "snr_gamma has no effect with distill"),
    ],
)
def test_options_of_the_times_are_refused_where_one_time_is_trained(given, sentence):
    TrainingConfig(distill=True, loss_weighting="flow")
    with pytest.raises(RefusedInputError, match=sentence):
        TrainingConfig(distill=True, **given)


def test_lpips_is_refused_without_the_distillation_that_uses_it():
    TrainingConfig(distill=True, lpips_weight=0.5, lpips_net="squeeze")
    with pytest.raises(RefusedInputError, match=r"lpips_weight works only with distill, .* got 0.5: add --distill"):
        TrainingConfig(lpips_weight=0.5)
    with pytest.raises(RefusedInputError, match="lpips_net alex has no effect without LPIPS in the loss"):
        TrainingConfig(distill=True, lpips_net="alex")
