"""Velocity loss: the flow-matching loss of a network's output, and its gradient, in one pass over memory.

    error    = model_output - (e * latents + f * noise)      e, f from t: the output whose velocity is latents - noise
    loss     = weight * sum(mask * error²) / sum(mask)       per sample; weight = Q², velocity = P * sample + Q * output
    gradient = slope * mask * error                          slope = 2 * weight / sum(mask)

Diff2Flow, arXiv 2506.02221, section 3.2; Q² * ‖output - target‖² is the same number as ‖velocity - (latents - noise)‖².
Without a mask sum(mask) is the number of elements of a sample.

model_output, latents, noise: [B, C, H, W] float32, float16 or bfloat16, of any strides; t, loss, slope: [B] float32.
All arithmetic is float32. mask * error is kept in float32 whatever the type of the output. The backward pass multiplies
it by the slope and by the incoming gradient, so that the gradient is rounded once and never underflows before it is
scaled. Sums are taken in a fixed order, in two stages without atomics: every run gives the same bits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2f_fast.flow import formulas
from d2f_fast.kernels.runtime import (
    dense_samples,
    is_dense,
    library,
    memory_format,
    on_device,
    sample_order,
    serves,
    wants_gradient,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 2048  # one 16-byte access of bfloat16 a thread
NUM_WARPS = 8
SUM_BLOCK = 1024  # partial sums that the second stage reads at once

# latents, noise, t, mask, prediction_type, t_min, t_max, weighting, snr_gamma
_Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, str, float, float, str, float]


def velocity_loss_reference(
    model_output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    mask: Tensor | None,
    prediction_type: str,
    t_min: float,
    t_max: float,
    weighting: str,
    snr_gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, error and slope in plain torch: differentiable, of any rank, in float64 where t is float64.

    Args:
        model_output, latents, noise: the network's output, clean latents and Gaussian noise, [B, ...].
        t: flow time, [B] float32 or float64.
        mask: non-negative weight of each element, broadcastable to [B, ...]; None for no mask.
        prediction_type: what the network predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".
        t_min, t_max: lowest and highest flow time of the table.
        weighting: factor on the velocity error: "flow", "native" or "min_snr".
        snr_gamma: gamma of "min_snr"; the other weightings ignore it.

    Returns:
        The loss of each sample, [B]; mask * error, [B, ...]; the slope, [B].
    """
    p, q = formulas.velocity_coefficients(t, prediction_type, t_min, t_max)
    e, f = formulas.target_coefficients(t, p, q, prediction_type)
    wide_latents, wide_noise = (formulas.at_least_float32(x).to(t.dtype) for x in (latents, noise))
    error = formulas.at_least_float32(model_output) - formulas.combine(e, wide_latents, f, wide_noise)
    weight = loss_weight(t, q, t_min, t_max, weighting, snr_gamma)
    if mask is None:
        mean = error.square().flatten(1).mean(1)
        return mean * weight, error, 2 * weight / math.prod(error.shape[1:])
    weights = mask.to(error.dtype).expand_as(error)
    total = weights.flatten(1).sum(1)
    total = torch.where(total > 0, total, 1)
    masked = error * weights
    return (masked * error).flatten(1).sum(1) / total * weight, masked, 2 * weight / total


def loss_weight(t: Tensor, q: Tensor, t_min: float, t_max: float, weighting: str, snr_gamma: float) -> Tensor:
    """Return the factor on ‖model_output - model_target‖², [B]: Q² times the weighting of the velocity error."""
    if weighting == "native":
        return torch.ones_like(t)
    if weighting == "flow":
        return q.square()
    alpha, sigma = formulas.readout_coefficients(t, t_min, t_max)
    # This is min(SNR, gamma) / SNR without a division by the SNR, which is 0 at the end of a zero-SNR schedule.
    return q.square() * snr_gamma / torch.maximum((alpha / sigma).square(), torch.full_like(t, snr_gamma))


if triton is not None:

    @triton.jit
    def _readout(t, t_min, t_max, from_t_max, from_t_min):
        """`formulas.readout_coefficients`; from_t_max and from_t_min are 1 - t_max and 1 - t_min, rounded once."""
        to_data = tl.minimum(tl.maximum(t, t_min), t_max)
        from_data = tl.minimum(tl.maximum(1 - t, from_t_max), from_t_min)
        n = tl.sqrt_rn(to_data * to_data + from_data * from_data)
        return tl.div_rn(to_data, n), tl.div_rn(from_data, n)

    @triton.jit
    def _coefficients(t, t_min, t_max, from_t_max, from_t_min, PREDICTION_TYPE: tl.constexpr):
        """Return e, f of `formulas.target_coefficients` and Q of `formulas.velocity_coefficients`."""
        zero, one = tl.full((), 0.0, tl.float32), tl.full((), 1.0, tl.float32)
        e, f, q = -one, one, -one  # flow_prediction
        if PREDICTION_TYPE != "flow_prediction":
            n = tl.sqrt_rn(t * t + (1 - t) * (1 - t))
            alpha, sigma = _readout(t, t_min, t_max, from_t_max, from_t_min)
            if PREDICTION_TYPE == "epsilon":
                a, b, c, d = tl.div_rn(one, alpha), tl.div_rn(-sigma, alpha), zero, one
            elif PREDICTION_TYPE == "v_prediction":
                a, b, c, d = alpha, -sigma, sigma, alpha
            else:
                a, b, c, d = zero, one, tl.div_rn(one, sigma), tl.div_rn(-alpha, sigma)
            below, above = t < t_min, t > t_max
            to_data, from_noise = 1 - tl.minimum(t, t_max), tl.maximum(t, t_max)
            p = tl.where(above, tl.div_rn(n - c, from_noise), a - c)
            p = tl.where(below, tl.div_rn(a - n, to_data), p)
            q = tl.where(above, tl.div_rn(-d, from_noise), b - d)
            q = tl.where(below, tl.div_rn(b, to_data), q)
            e = tl.div_rn(1 - tl.div_rn(p * t, n), q)
            f = -tl.div_rn(1 + tl.div_rn(p * (1 - t), n), q)
        return e, f, q

    @triton.jit
    def _error_kernel(
        output_ptr,
        latents_ptr,
        noise_ptr,
        t_ptr,
        mask_ptr,
        error_ptr,
        squares_ptr,
        totals_ptr,
        t_min,
        t_max,
        from_t_max,
        from_t_min,
        elements,
        blocks,
        size_1,
        size_2,
        stride_output_b,
        stride_latents_b,
        stride_latents_0,
        stride_latents_1,
        stride_latents_2,
        stride_noise_b,
        stride_noise_0,
        stride_noise_1,
        stride_noise_2,
        stride_mask_b,
        stride_mask_0,
        stride_mask_1,
        stride_mask_2,
        stride_t,
        PREDICTION_TYPE: tl.constexpr,
        LATENTS_FLAT: tl.constexpr,
        NOISE_FLAT: tl.constexpr,
        MASKED: tl.constexpr,
        STORE_ERROR: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b = tl.program_id(0) // blocks
        start = tl.program_id(0) % blocks * BLOCK
        row = b.to(tl.int64)
        t = tl.load(t_ptr + row * stride_t)
        e, f, _ = _coefficients(t, t_min, t_max, from_t_max, from_t_min, PREDICTION_TYPE)

        element = start + tl.arange(0, BLOCK)
        inside = element < elements
        latents_element, noise_element = element, element
        if MASKED or not LATENTS_FLAT or not NOISE_FLAT:
            # These are positions along the sample's dimensions, in the order of the output's memory.
            i_0 = (element // (size_1 * size_2)).to(tl.int64)
            i_1 = (element // size_2 % size_1).to(tl.int64)
            i_2 = (element % size_2).to(tl.int64)
            if not LATENTS_FLAT:
                latents_element = i_0 * stride_latents_0 + i_1 * stride_latents_1 + i_2 * stride_latents_2
            if not NOISE_FLAT:
                noise_element = i_0 * stride_noise_0 + i_1 * stride_noise_1 + i_2 * stride_noise_2
        output = tl.load(output_ptr + row * stride_output_b + element, mask=inside, other=0.0).to(tl.float32)
        latents = tl.load(latents_ptr + row * stride_latents_b + latents_element, mask=inside, other=0.0)
        noise = tl.load(noise_ptr + row * stride_noise_b + noise_element, mask=inside, other=0.0)
        error = output - (e * latents.to(tl.float32) + f * noise.to(tl.float32))
        masked = error
        if MASKED:
            mask_element = row * stride_mask_b + i_0 * stride_mask_0 + i_1 * stride_mask_1 + i_2 * stride_mask_2
            weight = tl.load(mask_ptr + mask_element, mask=inside, other=0.0).to(tl.float32)
            masked = error * weight
            tl.store(totals_ptr + tl.program_id(0), tl.sum(weight, 0))
        if STORE_ERROR:
            tl.store(error_ptr + row * elements + element, masked, mask=inside)
        # Lanes outside the sample hold 0, or NaN where t is NaN, which makes the loss NaN too.
        tl.store(squares_ptr + tl.program_id(0), tl.sum(masked * error, 0))

    @triton.jit
    def _sum_kernel(
        squares_ptr,
        totals_ptr,
        t_ptr,
        loss_ptr,
        slope_ptr,
        t_min,
        t_max,
        from_t_max,
        from_t_min,
        snr_gamma,
        elements,
        blocks,
        stride_t,
        PREDICTION_TYPE: tl.constexpr,
        WEIGHTING: tl.constexpr,
        MASKED: tl.constexpr,
        BLOCKS: tl.constexpr,
        SUM_BLOCK: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, SUM_BLOCK)
        squares, totals = tl.zeros((SUM_BLOCK,), tl.float32), tl.zeros((SUM_BLOCK,), tl.float32)
        for first in range(0, BLOCKS, SUM_BLOCK):
            inside = first + lane < blocks
            squares += tl.load(squares_ptr + b * blocks + first + lane, mask=inside, other=0.0)
            if MASKED:
                totals += tl.load(totals_ptr + b * blocks + first + lane, mask=inside, other=0.0)
        total = tl.full((), 0.0, tl.float32) + elements
        if MASKED:
            total = tl.sum(totals, 0)
            total = tl.where(total > 0, total, 1.0)
        t = tl.load(t_ptr + b * stride_t)
        weight = tl.full((), 1.0, tl.float32)
        if WEIGHTING != "native":
            _, _, q = _coefficients(t, t_min, t_max, from_t_max, from_t_min, PREDICTION_TYPE)
            weight = q * q
            if WEIGHTING == "min_snr":
                alpha, sigma = _readout(t, t_min, t_max, from_t_max, from_t_min)
                ratio = tl.div_rn(alpha, sigma)
                weight = tl.div_rn(weight * snr_gamma, tl.maximum(ratio * ratio, snr_gamma))
        tl.store(loss_ptr + b, tl.div_rn(tl.sum(squares, 0), total) * weight)
        tl.store(slope_ptr + b, tl.div_rn(2 * weight, total))


def velocity_loss_launch(
    model_output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    mask: Tensor | None,
    prediction_type: str,
    t_min: float,
    t_max: float,
    weighting: str,
    snr_gamma: float,
    need_error: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `velocity_loss_reference` returns, by the Triton kernels; the error is empty unless it is needed."""
    model_output = dense_samples(model_output)
    loss, error, slope = _outputs(model_output, t, need_error)
    if not len(t):
        return loss, error, slope
    order, elements = sample_order(model_output), model_output[0].numel()
    blocks = triton.cdiv(elements, BLOCK)
    squares = torch.empty(1 if mask is None else 2, len(t) * blocks, dtype=torch.float32, device=t.device)
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.to(torch.float32)
        mask = mask.expand_as(model_output)
    ends = (t_min, t_max, 1 - t_max, 1 - t_min)
    with on_device(model_output):
        _error_kernel[(len(t) * blocks,)](
            model_output,
            latents,
            noise,
            t,
            mask,
            error,
            squares[0],
            squares[-1],
            *ends,
            elements,
            blocks,
            *(model_output.shape[dimension] for dimension in order[1:]),
            model_output.stride(0),
            *(latents.stride(dimension) for dimension in (0, *order)),
            *(noise.stride(dimension) for dimension in (0, *order)),
            *(0 if mask is None else mask.stride(dimension) for dimension in (0, *order)),
            t.stride(0),
            PREDICTION_TYPE=prediction_type,
            LATENTS_FLAT=is_dense(latents, order),
            NOISE_FLAT=is_dense(noise, order),
            MASKED=mask is not None,
            STORE_ERROR=need_error,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        _sum_kernel[(len(t),)](
            squares[0],
            squares[-1],
            t,
            loss,
            slope,
            *ends,
            snr_gamma,
            elements,
            blocks,
            t.stride(0),
            PREDICTION_TYPE=prediction_type,
            WEIGHTING=weighting,
            MASKED=mask is not None,
            BLOCKS=triton.next_power_of_2(blocks),
            SUM_BLOCK=SUM_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return loss, error, slope


def velocity_loss_cpu(model_output: Tensor, *operands: *tuple[*_Operands, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `velocity_loss_reference` returns, in the memory layout that the kernels give it."""
    loss, error, slope = velocity_loss_reference(model_output, *operands[:-1])
    need_error = operands[-1]
    error = error.contiguous(memory_format=memory_format(model_output)) if need_error else error.new_empty(0)
    return loss, error, slope


def velocity_loss_fake(model_output: Tensor, *operands: *tuple[*_Operands, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the op's outputs without their values."""
    return _outputs(model_output, operands[2], operands[-1])


def _outputs(model_output: Tensor, t: Tensor, need_error: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the op's outputs."""
    shape, layout = (model_output.shape, memory_format(model_output)) if need_error else ((0,), torch.contiguous_format)
    error = torch.empty(shape, dtype=torch.float32, device=model_output.device, memory_format=layout)
    return t.new_empty(t.shape), error, t.new_empty(t.shape)


library.define(
    "velocity_loss(Tensor model_output, Tensor latents, Tensor noise, Tensor t, Tensor? mask, str prediction_type,"
    " float t_min, float t_max, str weighting, float snr_gamma, bool need_error) -> (Tensor, Tensor, Tensor)"
)
library.impl("velocity_loss", velocity_loss_cpu, "CPU")
library.impl("velocity_loss", velocity_loss_cpu if triton is None else velocity_loss_launch, "CUDA")
torch.library.register_fake("d2f_fast::velocity_loss", velocity_loss_fake, lib=library)


class _VelocityLoss(torch.autograd.Function):
    """Loss of each sample, differentiable once, with respect to the network's output alone."""

    @staticmethod
    def forward(ctx: Any, model_output: Tensor, *operands: *_Operands) -> Tensor:
        loss: Tensor
        loss, error, slope = torch.ops.d2f_fast.velocity_loss(model_output, *operands, True)
        ctx.save_for_backward(error, slope)
        ctx.dtype = model_output.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # The stored error is a constant to autograd: a second derivative would silently lack a term. (A compiled
        # backward pass refuses it by itself.)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "aligned_loss can be differentiated once, got create_graph=True: pass t in float64 for plain torch"
            )
        error, slope = ctx.saved_tensors
        return (formulas.over_latents(grad_loss * slope, error) * error).to(ctx.dtype), *(None,) * 9


def velocity_loss(
    model_output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    mask: Tensor | None,
    prediction_type: str,
    t_min: float,
    t_max: float,
    weighting: str,
    snr_gamma: float,
) -> Tensor:
    """Return the loss of `velocity_loss_reference` for each sample, [B], by the op where it serves these operands."""
    operands = (latents, noise, t, mask, prediction_type, t_min, t_max, weighting, snr_gamma)
    if not serves(t, model_output, latents, noise) or wants_gradient(latents, noise, t, mask):
        return velocity_loss_reference(model_output, *operands)[0]
    if wants_gradient(model_output):
        apply: Callable[..., Tensor] = _VelocityLoss.apply
        return apply(model_output, *operands)
    loss: Tensor = torch.ops.d2f_fast.velocity_loss(model_output, *operands, False)[0]
    return loss
