"""The door to the kernels: align before the network, the loss after it, and the LoRA layers inside.

On a GPU align and aligned_loss are each an op of Triton kernels, `kernels/align.py` and `kernels/velocity_loss.py`.
Plain torch, the same formulas, serves what the kernels do not: other devices; gradients with respect to latents, noise,
t or mask; float64; ranks other than 4; graphs for export.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from d2f_fast.config import LossWeighting
from d2f_fast.flow.formulas import Flow
from d2f_fast.kernels.align import align as fused_align
from d2f_fast.kernels.lora_dispatch import MIN_ROWS, choose_path, runs_plain
from d2f_fast.kernels.lora_linear import lora_linear, lora_linear_packed
from d2f_fast.kernels.runtime import autocasts, kernel_path
from d2f_fast.kernels.velocity_loss import velocity_loss

__all__ = [
    "MIN_ROWS",
    "align",
    "aligned_loss",
    "autocasts",
    "check_operands",
    "choose_path",
    "kernel_path",
    "lora_linear",
    "lora_linear_packed",
    "runs_plain",
]

Reduction = Literal["mean", "none"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def align(latents: Tensor, noise: Tensor, t: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
    """What the network is given at flow time t: `to_sample(t * latents + (1 - t) * noise, t)` and `timestep(t)`.

    Times outside [0, 1] are not looked for, which would wait for the device: the state is extrapolated, the timestep
    stays in [0, T-1] (except for `NaiveFlow`, whose timestep goes on).

    Args:
        latents, noise: [B, C, H, W] float32, float16 or bfloat16, of any strides.
        t: [B] float32 in [0, 1], 0 = noise.
        flow: an `Alignment` (or `NaiveFlow`) on the same device.

    Returns:
        The state, [B, C, H, W] in the type of the latents, rounded once; the timestep, [B] float32, fractional.

    Raises:
        ValueError: shapes, types or devices do not fit, or t is not float32 (or float64) of shape [B].
    """
    check_operands(latents, noise, t)
    table = flow.rising_flow_times(t.dtype)
    if table is not None and table.device != latents.device:
        raise ValueError(
            f"the alignment must be on {latents.device} as the latents, got {table.device}: use alignment.to(device)"
        )
    return fused_align(latents, noise, t, table, flow.t_min, flow.num_train_timesteps)


def aligned_loss(
    model_output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    flow: Flow,
    weighting: LossWeighting = "flow",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    snr_gamma: float = 5.0,
) -> Tensor:
    """Flow-matching loss of the network's output: weight * ‖velocity - (latents - noise)‖², mean over the elements.

    Computed as Q² * ‖model_output - model_target‖², the same number (velocity is linear in the output), with its
    gradient beside it. The output can be differentiated once: a second derivative is an error where the op serves.

    Args:
        model_output, latents, noise: [B, C, H, W], of any strides; the output may be of lower precision.
        t: [B] float32 in [0, 1]; beyond, the formulas go on.
        flow: an `Alignment` (or `NaiveFlow`) on the same device.
        weighting: "flow" 1, the paper's; "native" 1 / Q², the network's own loss; "min_snr" min(SNR, gamma) / SNR.
        mask: [B or 1, C or 1, H or 1, W or 1], weight of each element, not negative; a sample's loss is its weighted
            mean, 0 for an empty mask.
        reduction: "mean" over the batch (NaN for an empty one, as in torch), or "none" for the loss per sample, [B].
        snr_gamma: gamma of "min_snr".

    Returns:
        float32 scalar, or [B]; float64 where t is float64.

    Raises:
        ValueError: shapes, types or devices do not fit, t is not float32 of shape [B], an unknown weighting or
            reduction, or a gamma that is not positive.
    """
    check_operands(latents, noise, t, model_output, mask)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if weighting not in get_args(LossWeighting):
        raise ValueError(f"loss_weighting must be one of {get_args(LossWeighting)}, got {weighting!r}")
    if not 0 < snr_gamma < math.inf:
        raise ValueError(f"snr_gamma must be a positive number, got {snr_gamma!r}")
    if weighting == "min_snr" and flow.prediction_type == "flow_prediction":
        raise ValueError('loss_weighting "min_snr" needs a diffusion prediction: flow_prediction has no SNR of its own')
    ends = (flow.t_min, flow.t_max)
    per_sample = velocity_loss(model_output, latents, noise, t, mask, flow.prediction_type, *ends, weighting, snr_gamma)
    return per_sample.mean() if reduction == "mean" else per_sample


def check_operands(
    latents: Tensor, noise: Tensor, t: Tensor, model_output: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Refuse what would broadcast, truncate, round the time, or fail on the device."""
    shape = list(latents.shape)
    if latents.ndim < 2 or not math.prod(shape[1:]):
        raise ValueError(f"latents must have shape [B, C, H, W] with C, H and W at least 1, got {shape}")
    for name, tensor in (("latents", latents), ("noise", noise), ("model_output", model_output)):
        if tensor is None:
            continue
        if tensor.shape != latents.shape:
            raise ValueError(f"{name} must have the latents' shape {shape}, got {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if t.dtype not in (torch.float32, torch.float64) or t.shape != latents.shape[:1]:
        raise ValueError(f"t must be float32 of shape {shape[:1]}, got {t.dtype} {list(t.shape)}")
    # [B, H, W] would broadcast its batch over the channels wherever B = C.
    if mask is not None and (
        mask.ndim != latents.ndim or any(m not in (1, n) for m, n in zip(mask.shape, latents.shape, strict=True))
    ):
        raise ValueError(f"mask must have {latents.ndim} dimensions that broadcast to {shape}, got {list(mask.shape)}")
    if mask is not None and mask.is_complex():
        raise ValueError(f"mask must hold real numbers, got {mask.dtype}")
    for name, tensor in (("noise", noise), ("t", t), ("model_output", model_output), ("mask", mask)):
        if tensor is not None and tensor.device != latents.device:
            raise ValueError(f"{name} must be on {latents.device} as the latents, got {tensor.device}")
