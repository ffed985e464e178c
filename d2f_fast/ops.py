"""The door to the kernels: `align` before the network, `aligned_loss` after it, and the LoRA linears inside it.

On a GPU, `align` and `aligned_loss` are each an op of Triton kernels, in `kernels/align.py` and
`kernels/velocity_loss.py`. Plain torch computes the same formulas for everything that the kernels do not serve: other
devices; gradients with respect to latents, noise, t or mask; float64; ranks other than 4; graphs for export.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from d2f_fast.config import LossWeighting
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import uses_published_form
from d2f_fast.kernels.align import align as fused_align
from d2f_fast.kernels.lora_dispatch import MIN_ROWS, choose_path, runs_plain
from d2f_fast.kernels.lora_linear import lora_linear, lora_linear_packed
from d2f_fast.kernels.runtime import autocasts, is_channels_last, kernel_path
from d2f_fast.kernels.velocity_loss import velocity_loss

__all__ = [
    "MIN_ROWS",
    "align",
    "aligned_loss",
    "autocasts",
    "check_operands",
    "choose_path",
    "is_channels_last",
    "kernel_path",
    "lora_linear",
    "lora_linear_packed",
    "runs_plain",
]

Reduction = Literal["mean", "none"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def align(latents: Tensor, noise: Tensor, t: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
    """Return the network's inputs at flow time t: its state and its timestep.

        flow.to_sample(flow.interpolate(latents, noise, t), t), flow.timestep(t)

    Times outside [0, 1] are refused on a CPU. On a GPU they are not detected, because a check would wait for it: there
    the state is extrapolated, and the timestep stays in [0, T-1] (for `NaiveFlow` it is extrapolated too).

    Args:
        latents: clean latents, [B, C, H, W] float32, float16 or bfloat16, of any strides.
        noise: Gaussian noise, same shape.
        t: flow time, [B] float32 in [0, 1], 0 = noise and 1 = data.
        flow: `Alignment` or `NaiveFlow` of the network, on the device of the latents.

    Returns:
        The state, [B, C, H, W] in the type of the latents, rounded once; the fractional timestep, [B] float32.

    Raises:
        ValueError: shapes, types or devices do not fit, or t is not float32 (or float64) of shape [B] in [0, 1].
    """
    check_operands(latents, noise, t)
    table = flow.rising_flow_times(t.dtype)
    if table is not None and table.device != latents.device:
        raise ValueError(
            f"the alignment must be on {latents.device} as the latents, got {table.device}: use alignment.to(device)"
        )
    sample, timestep = fused_align(latents, noise, t, table, flow.t_min, flow.num_train_timesteps)
    return sample, t if uses_published_form(flow) else timestep


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
    """Return the flow-matching loss of the network's output.

        weight * mean(‖flow.velocity(model_output, sample, t) - (latents - noise)‖²)

    It is computed as Q² * ‖model_output - model_target‖², the same number because the velocity is linear in the output,
    together with its gradient. It can be differentiated once: a second derivative is an error where the op serves.

    Args:
        model_output: output of the network, [B, C, H, W] of any strides; it may be of lower precision than the latents.
        latents: clean latents, same shape.
        noise: Gaussian noise, same shape.
        t: flow time, [B] float32 in [0, 1]. On a GPU, times outside are not detected, and the formulas are
            extrapolated.
        flow: `Alignment` or `NaiveFlow` of the network, on the device of the latents.
        weighting: factor on the velocity error: "flow" 1, the paper's; "native" 1 / Q², which gives the network's own
            loss; "min_snr" min(SNR, gamma) / SNR.
        mask: non-negative weight of each element, [B or 1, C or 1, H or 1, W or 1]; a sample's loss is its weighted
            mean, 0 where all its weights are 0. None weighs all elements equally.
        reduction: "mean" over the batch (NaN for an empty batch, as in torch), or "none" for the loss of each sample.
        snr_gamma: positive gamma of "min_snr"; the other weightings ignore it.

    Returns:
        The loss, a float32 scalar, or [B] without reduction; float64 where t is float64.

    Raises:
        ValueError: shapes, types or devices do not fit, t is not float32 (or float64) of shape [B] in [0, 1], the
            weighting or the reduction is unknown, or gamma is not positive.
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
    if uses_published_form(flow):
        # Its target, latents - noise, is what the formulas call noise - latents of the two exchanged.
        latents, noise = noise, latents
    ends = (flow.t_min, flow.t_max)
    per_sample = velocity_loss(model_output, latents, noise, t, mask, flow.prediction_type, *ends, weighting, snr_gamma)
    return per_sample.mean() if reduction == "mean" else per_sample


def check_operands(
    latents: Tensor, noise: Tensor, t: Tensor, model_output: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Refuse operands that would broadcast, be truncated, round the time, or fail on the device.

    Raises:
        ValueError: shapes, types or devices do not fit, or a time is outside [0, 1]; the message names the operand.
    """
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
    # A mask [B, H, W] would silently broadcast its batch over the channels wherever B = C.
    if mask is not None and (
        mask.ndim != latents.ndim or any(m not in (1, n) for m, n in zip(mask.shape, latents.shape, strict=True))
    ):
        raise ValueError(f"mask must have {latents.ndim} dimensions that broadcast to {shape}, got {list(mask.shape)}")
    if mask is not None and mask.is_complex():
        raise ValueError(f"mask must hold real numbers, got {mask.dtype}")
    for name, tensor in (("noise", noise), ("t", t), ("model_output", model_output), ("mask", mask)):
        if tensor is not None and tensor.device != latents.device:
            raise ValueError(f"{name} must be on {latents.device} as the latents, got {tensor.device}")
    _check_range(t)


def _check_range(t: Tensor) -> None:
    """Refuse times outside [0, 1] where they can be read without waiting for a device."""
    # Tensors of other types stand for values that are not known: those of traced, compiled or exported graphs.
    if torch.compiler.is_compiling() or t.device.type != "cpu" or type(t) is not Tensor:
        return
    for value in t.tolist():
        if not 0 <= value <= 1:
            raise ValueError(
                f"t must be in [0, 1], 0 for noise and 1 for data, got {value:g}: flow.flow_time(timestep) makes it of"
                " diffusion timesteps"
            )
