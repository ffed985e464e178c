"""Align: compute the network's inputs at flow time t, the diffusion state and its timestep, in one launch.

    sample   = (t * latents + (1 - t) * noise) / n      n = sqrt(t² + (1 - t)²)
    timestep = T - 1 - k - (t - r_k) / (r_k+1 - r_k)    r the table of flow times, ascending, r_k <= t < r_k+1

Diff2Flow, arXiv 2506.02221, section 3.2: interpolant alignment and timestep rescaling. Without a table n = 1 and
timestep = T * (1 - t): naive flow matching.

latents, noise: [B, C, H, W] float32, float16 or bfloat16, of any strides; t, timestep: [B] float32. All arithmetic is
float32; the sample is rounded once, at the store, to the type of the latents, and has their memory layout.
"""

import torch
from torch import Tensor

from d2f_fast.flow.formulas import combine, interpolate_timestep, naive_timestep, state_scale
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


def align_reference(
    latents: Tensor, noise: Tensor, t: Tensor, rising_flow_times: Tensor | None, t_min: float, num_train_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Return sample and timestep in plain torch: differentiable, of any rank, in float64 where t is float64.

    Args:
        latents: clean latents, [B, ...].
        noise: Gaussian noise, same shape.
        t: flow time, [B] float32 or float64.
        rising_flow_times: table of flow times, [T] ascending in t's type; None for naive flow matching.
        t_min: flow time below which the timestep no longer changes.
        num_train_timesteps: number T of timesteps.

    Returns:
        The diffusion state in the type of the latents, and the fractional timestep, [B] in t's type.
    """
    if rising_flow_times is None:
        n, timestep = torch.ones_like(t), naive_timestep(t, num_train_timesteps)
    else:
        n, timestep = state_scale(t), interpolate_timestep(t, rising_flow_times, t_min)
    return combine(t / n, latents, (1 - t) / n, noise).to(latents.dtype), timestep


if triton is not None:

    @triton.jit
    def _align_kernel(
        latents_ptr,
        noise_ptr,
        t_ptr,
        table_ptr,
        sample_ptr,
        timestep_ptr,
        t_min,
        num_train_timesteps,
        elements,
        blocks,
        size_1,
        size_2,
        stride_latents_b,
        stride_noise_b,
        stride_noise_0,
        stride_noise_1,
        stride_noise_2,
        stride_t,
        ALIGNED: tl.constexpr,
        NOISE_FLAT: tl.constexpr,
        TABLE_BLOCK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b = tl.program_id(0) // blocks
        start = tl.program_id(0) % blocks * BLOCK
        row = b.to(tl.int64)
        t = tl.load(t_ptr + row * stride_t)
        n = 1.0
        if ALIGNED:
            n = tl.sqrt_rn(t * t + (1 - t) * (1 - t))

        element = start + tl.arange(0, BLOCK)
        inside = element < elements
        noise_element = element
        if not NOISE_FLAT:
            noise_element = (
                (element // (size_1 * size_2)).to(tl.int64) * stride_noise_0
                + (element // size_2 % size_1).to(tl.int64) * stride_noise_1
                + (element % size_2).to(tl.int64) * stride_noise_2
            )
        latents = tl.load(latents_ptr + row * stride_latents_b + element, mask=inside).to(tl.float32)
        noise = tl.load(noise_ptr + row * stride_noise_b + noise_element, mask=inside).to(tl.float32)
        sample = tl.div_rn(t, n) * latents + tl.div_rn(1 - t, n) * noise
        tl.store(sample_ptr + row * elements + element, sample.to(sample_ptr.dtype.element_ty), mask=inside)

        if start == 0:
            timestep = num_train_timesteps * (1 - t)
            if ALIGNED:
                # Counting the nodes at or below t reads the table at once; bisection would wait for ten reads in turn.
                node = tl.arange(0, TABLE_BLOCK)
                nodes = tl.load(table_ptr + node, mask=node < num_train_timesteps, other=float("inf"))
                # A NaN must stay NaN, as it does in torch.
                t = tl.maximum(t, t_min, propagate_nan=tl.PropagateNan.ALL)
                upper = tl.sum((nodes <= t).to(tl.int32), 0)
                upper = tl.minimum(tl.maximum(upper, 1), num_train_timesteps - 1)
                below, above = tl.load(table_ptr + upper - 1), tl.load(table_ptr + upper)
                timestep = (num_train_timesteps - upper).to(tl.float32) - tl.div_rn(t - below, above - below)
                timestep = tl.maximum(timestep, 0.0, propagate_nan=tl.PropagateNan.ALL)
                timestep = tl.minimum(timestep, num_train_timesteps - 1.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(timestep_ptr + row, timestep)


def align_launch(
    latents: Tensor, noise: Tensor, t: Tensor, rising_flow_times: Tensor | None, t_min: float, num_train_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Return what `align_reference` returns, by the Triton kernel."""
    latents = dense_samples(latents)
    sample, timestep = align_fake(latents, noise, t, rising_flow_times, t_min, num_train_timesteps)
    if not len(t):
        return sample, timestep
    order, elements = sample_order(latents), latents[0].numel()
    blocks = triton.cdiv(elements, BLOCK)
    with on_device(latents):
        _align_kernel[(blocks * len(t),)](
            latents,
            noise,
            t,
            rising_flow_times,
            sample,
            timestep,
            t_min,
            num_train_timesteps,
            elements,
            blocks,
            *(latents.shape[dimension] for dimension in order[1:]),
            latents.stride(0),
            noise.stride(0),
            *(noise.stride(dimension) for dimension in order),
            t.stride(0),
            ALIGNED=rising_flow_times is not None,
            NOISE_FLAT=is_dense(noise, order),
            TABLE_BLOCK=triton.next_power_of_2(num_train_timesteps),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return sample, timestep


def align_cpu(
    latents: Tensor, noise: Tensor, t: Tensor, rising_flow_times: Tensor | None, t_min: float, num_train_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Return what `align_reference` returns, in the memory layout that the kernel gives it."""
    sample, timestep = align_reference(latents, noise, t, rising_flow_times, t_min, num_train_timesteps)
    return sample.contiguous(memory_format=memory_format(latents)), timestep


def align_fake(
    latents: Tensor, noise: Tensor, t: Tensor, rising_flow_times: Tensor | None, t_min: float, num_train_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Return the op's outputs without their values."""
    sample = torch.empty(
        latents.shape, dtype=latents.dtype, device=latents.device, memory_format=memory_format(latents)
    )
    return sample, t.new_empty(t.shape)


library.define(
    "align(Tensor latents, Tensor noise, Tensor t, Tensor? rising_flow_times, float t_min, int num_train_timesteps)"
    " -> (Tensor, Tensor)"
)
library.impl("align", align_cpu, "CPU")
library.impl("align", align_cpu if triton is None else align_launch, "CUDA")
torch.library.register_fake("d2f_fast::align", align_fake, lib=library)


def align(
    latents: Tensor, noise: Tensor, t: Tensor, rising_flow_times: Tensor | None, t_min: float, num_train_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Return what `align_reference` returns, by the op where it serves these operands."""
    operands = (latents, noise, t, rising_flow_times, t_min, num_train_timesteps)
    if serves(t, latents, noise) and not wants_gradient(latents, noise, t):
        aligned: tuple[Tensor, Tensor] = torch.ops.d2f_fast.align(*operands)
        return aligned
    return align_reference(*operands)
