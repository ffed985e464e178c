"""The door to the kernels: align before the network, the loss after it, and LoRA layers inside."""

from typing import Literal, get_args

import torch
from torch import Tensor

from d2f_fast.alignment import Alignment, FlowModel, at_least_float32, combine
from d2f_fast.config import LossWeighting
from d2f_fast.kernels.lora_dispatch import MIN_ROWS, choose_path, runs_plain
from d2f_fast.kernels.lora_linear import lora_linear, lora_linear_packed

__all__ = [
    "MIN_ROWS",
    "align",
    "aligned_loss",
    "check_operands",
    "choose_path",
    "lora_linear",
    "lora_linear_packed",
    "loss_weight",
    "runs_plain",
]

Reduction = Literal["mean", "none"]


def align(latents: Tensor, noise: Tensor, t: Tensor, model: FlowModel) -> tuple[Tensor, Tensor]:
    """What the network is given at flow time t: `to_sample(t * latents + (1 - t) * noise, t)` and `timestep(t)`.

    Args:
        latents, noise: [B, C, H, W] float32, float16 or bfloat16.
        t: [B] float32 in [0, 1], 0 = noise.
        model: an `Alignment` (or `NaiveFlow`) on the same device.

    Returns:
        The state, [B, C, H, W] in the type of the latents, rounded once; the timestep, [B] float32, fractional.

    Raises:
        ValueError: shapes differ, or t is not float32 (or float64) of shape [B].
    """
    check_operands(latents, noise, t)
    n = model.state_scale(t)
    sample = combine(t / n, latents, (1 - t) / n, noise).to(latents.dtype)
    return sample, model.timestep(t)


def aligned_loss(
    model_output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    model: FlowModel,
    weighting: LossWeighting = "flow",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    snr_gamma: float = 5.0,
) -> Tensor:
    """Flow-matching loss of the network's output: weight * ‖velocity - (latents - noise)‖², mean over the elements.

    Computed as Q² * ‖model_output - model_target‖², the same number (velocity is linear in the output).

    Args:
        model_output, latents, noise: [B, C, H, W]; the output may be of lower precision.
        t: [B] float32 in [0, 1].
        model: an `Alignment` (or `NaiveFlow`) on the same device.
        weighting: "flow" 1, the paper's; "native" 1 / Q², the network's own loss; "min_snr" min(SNR, gamma) / SNR.
        mask: [B or 1, C or 1, H or 1, W or 1], weight of each element, not negative; a sample's loss is its weighted
            mean, 0 for an empty mask.
        reduction: "mean" over the batch, or "none" for the loss per sample, [B].
        snr_gamma: gamma of "min_snr".

    Returns:
        float32 scalar, or [B]; float64 where t is float64.

    Raises:
        ValueError: shapes differ, t is not float32 of shape [B], or an unknown weighting or reduction.
    """
    check_operands(latents, noise, t)
    if model_output.shape != latents.shape:
        raise ValueError(
            f"model_output must have the latents' shape {list(latents.shape)}, got {list(model_output.shape)}"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    wide_latents = at_least_float32(latents).to(t.dtype)
    error = at_least_float32(model_output) - model.model_target(wide_latents, at_least_float32(noise).to(t.dtype), t)
    squares = error.square()
    if mask is None:
        per_sample = squares.flatten(1).mean(1)
    else:
        # [B, H, W] would broadcast its batch over the channels wherever B = C.
        if mask.ndim != latents.ndim or any(m not in (1, n) for m, n in zip(mask.shape, latents.shape, strict=True)):
            raise ValueError(
                f"mask must have {latents.ndim} dimensions that broadcast to {list(latents.shape)},"
                f" got {list(mask.shape)}"
            )
        weights = mask.to(squares.dtype).expand_as(squares).flatten(1)
        total = weights.sum(1)
        per_sample = (squares.flatten(1) * weights).sum(1) / torch.where(total > 0, total, 1)
    per_sample = per_sample * loss_weight(model, t, weighting, snr_gamma)
    return per_sample.mean() if reduction == "mean" else per_sample


def loss_weight(model: FlowModel, t: Tensor, weighting: LossWeighting, snr_gamma: float = 5.0) -> Tensor:
    """Factor on ‖model_output - model_target‖², [B]: Q² times the weighting's own factor on the velocity error."""
    if weighting == "native":
        return torch.ones_like(t)
    _, q = model.velocity_coefficients(t)
    if weighting == "flow":
        return q.square()
    if weighting != "min_snr":
        raise ValueError(f"loss_weighting must be one of {get_args(LossWeighting)}, got {weighting!r}")
    if not isinstance(model, Alignment):
        raise ValueError('loss_weighting "min_snr" needs a diffusion prediction: flow_prediction has no SNR of its own')
    alpha, sigma = model.coefficients(t)
    # min(SNR, gamma) / SNR, without a division by the SNR that is 0 at a zero-SNR end.
    return q.square() * snr_gamma / torch.maximum((alpha / sigma).square(), torch.full_like(t, snr_gamma))


def check_operands(latents: Tensor, noise: Tensor, t: Tensor) -> None:
    """Refuse what would broadcast, or round the time."""
    if noise.shape != latents.shape:
        raise ValueError(f"noise must have the latents' shape {list(latents.shape)}, got {list(noise.shape)}")
    if t.dtype not in (torch.float32, torch.float64) or t.shape != latents.shape[:1]:
        raise ValueError(f"t must be float32 of shape {list(latents.shape[:1])}, got {t.dtype} {list(t.shape)}")
