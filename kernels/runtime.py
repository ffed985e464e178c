"""Which implementation of a kernel runs: Triton on a GPU, the plain torch reference everywhere else.

Triton is imported at the first question, never by importing this module: without Triton or without a GPU the package
works, on the reference.
"""

import contextlib
import functools
import logging
import os
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Every op is defined in its kernel's file: CPU runs the reference, CUDA the kernel. The ops are private: called on a
# tensor that requires grad they give none, without a word; the public functions go through autograd.Function.
library = torch.library.Library("d2f_fast", "FRAGMENT")

# Triton's interpreter, in which kernels run on the CPU for tests, computes bfloat16 on bit patterns: they upcast there.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# What kernels read and write; their arithmetic is float32.
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Asked once, here: torch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))

# Lanes of a program hold 32-bit positions within a sample; everything across samples is 64 bits wide.
MOST_ELEMENTS = 2**31 - 2**16


@functools.cache
def triton_available() -> bool:
    """Say whether `import triton` succeeds in this process."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def kernel_path(device: torch.device | str) -> Literal["triton", "torch"]:
    """Choose the implementation that serves tensors on `device`, and log the choice once.

    For the host, outside compiled code: the log call would break a graph.

    Args:
        device: where the tensors are; "cuda" also stands for ROCm, as in torch.

    Returns:
        "triton" on a GPU when Triton can be imported, otherwise "torch".
    """
    device_type = torch.device(device).type
    if device_type != "cuda":
        _log_once(logging.INFO, f"plain torch runs instead of the Triton kernels: they need a GPU, not {device_type}")
        return "torch"
    if not triton_available():
        _log_once(logging.WARNING, "plain torch runs instead of the Triton kernels, slower: `pip install triton`")
        return "torch"
    _log_once(logging.INFO, "the Triton kernels run")
    return "triton"


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "d2f_fast: %s", message)


def serves(t: Tensor, *operands: Tensor) -> bool:
    """Say whether the alignment ops serve these operands; plain torch, the same formulas, serves all others.

    On a CPU an op wins nothing: its implementation is plain torch, its call costs 20 µs more than the formulas
    themselves, and Inductor, which fuses them, could not look into it. Graphs for export hold plain torch.
    """
    if t.device.type != "cuda" or torch.compiler.is_exporting():
        return False
    return t.dtype == torch.float32 and all(x.ndim == 4 and x.dtype in STORED_DTYPES for x in operands)


def wants_gradient(*operands: Tensor | None) -> bool:
    """Say whether autograd would follow one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def autocasts(x: Tensor) -> bool:
    """Say whether autocast changes the type of a product with x; a tensor of float64 it leaves alone."""
    device = x.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def on_device(operand: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the operand's GPU the one that Triton launches on."""
    return torch.cuda.device(operand.device) if operand.is_cuda else contextlib.nullcontext()


def is_dense(x: Tensor, order: tuple[int, ...]) -> bool:
    """Say whether each sample x[b] fills its memory without gaps, dimensions from slowest to fastest as in `order`."""
    expected = 1
    for dimension in reversed(order):
        if x.shape[dimension] != 1 and x.stride(dimension) != expected:
            return False
        expected *= x.shape[dimension]
    return True


def sample_order(x: Tensor) -> tuple[int, int, int]:
    """Dimensions of x, [B, C, H, W], in the order its samples are walked: (2, 3, 1) where they are channels_last."""
    return (2, 3, 1) if is_dense(x, (2, 3, 1)) and not is_dense(x, (1, 2, 3)) else (1, 2, 3)


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout of what is computed from x: its own, or contiguous where its samples are not dense."""
    return torch.channels_last if sample_order(x) == (2, 3, 1) else torch.contiguous_format


def dense_samples(x: Tensor) -> Tensor:
    """Give x, or a contiguous copy where its samples are not dense.

    Raises:
        ValueError: a sample has more elements than a kernel counts.
    """
    if len(x) and x[0].numel() > MOST_ELEMENTS:
        raise ValueError(f"a sample must have at most {MOST_ELEMENTS} elements, got {x[0].numel()}")
    return x if is_dense(x, sample_order(x)) else x.contiguous()
