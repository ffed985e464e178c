"""Runtime: choose the implementation of each kernel, Triton on a GPU and the plain torch reference everywhere else.

Triton is imported when it is first asked for, never by importing this module: without Triton or without a GPU the
package works with the reference.
"""

import contextlib
import functools
import logging
import os
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Every op is defined in its kernel's file: CPU runs the reference, CUDA the kernel. The ops are private, since a tensor
# that requires a gradient silently gets none from them; the public functions go through autograd.Function.
library = torch.library.Library("d2f_fast", "FRAGMENT")

# Triton's interpreter, in which tests run kernels on the CPU, computes bfloat16 on bit patterns: kernels upcast in it.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Types that kernels read and write; their arithmetic is float32.
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The devices are asked for once, here, because torch 2.11 cannot trace is_autocast_available.
AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))

# Lanes of a program hold 32-bit positions within a sample; offsets across samples are 64 bits wide.
MOST_ELEMENTS = 2**31 - 2**16


@functools.cache
def triton_available() -> bool:
    """Return whether `import triton` succeeds in this process."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def kernel_path(device: torch.device | str) -> Literal["triton", "torch"]:
    """Choose the implementation that serves tensors on `device`, and log the choice once.

    Call it outside compiled code: the log call would break a graph.

    Args:
        device: device of the tensors; "cuda" also stands for ROCm, as in torch.

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
    """Return whether the alignment ops serve these operands; plain torch serves all others with the same formulas.

    On a CPU an op gains nothing: its implementation is plain torch, its call costs 20 µs more than the formulas
    themselves, and Inductor, which fuses the formulas, cannot look into it. Graphs for export hold plain torch.
    """
    if t.device.type != "cuda" or torch.compiler.is_exporting():
        return False
    return t.dtype == torch.float32 and all(x.ndim == 4 and x.dtype in STORED_DTYPES for x in operands)


def wants_gradient(*operands: Tensor | None) -> bool:
    """Return whether autograd would record an operation on these operands."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast changes the type of a product with x; it leaves float64 tensors alone."""
    device = x.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def on_device(operand: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which Triton launches on the operand's GPU."""
    return torch.cuda.device(operand.device) if operand.is_cuda else contextlib.nullcontext()


def is_channels_last(x: Tensor) -> bool:
    """Return whether x, [B, C, H, W], is stored channels_last and is not contiguous at the same time."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_dense(x: Tensor, order: tuple[int, ...]) -> bool:
    """Return whether each sample x[b] fills its memory without gaps, with dimensions slowest to fastest in `order`."""
    expected = 1
    for dimension in reversed(order):
        if x.shape[dimension] != 1 and x.stride(dimension) != expected:
            return False
        expected *= x.shape[dimension]
    return True


def sample_order(x: Tensor) -> tuple[int, int, int]:
    """Return the order of the dimensions in which samples of x, [B, C, H, W], are read: (2, 3, 1) for channels_last."""
    return (2, 3, 1) if is_dense(x, (2, 3, 1)) and not is_dense(x, (1, 2, 3)) else (1, 2, 3)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of results computed from x: its own, or contiguous where its samples are not dense."""
    return torch.channels_last if sample_order(x) == (2, 3, 1) else torch.contiguous_format


def dense_samples(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where its samples are not dense.

    Raises:
        ValueError: a sample has more elements than a kernel can count.
    """
    if len(x) and x[0].numel() > MOST_ELEMENTS:
        raise ValueError(f"a sample must have at most {MOST_ELEMENTS} elements, got {x[0].numel()}")
    return x if is_dense(x, sample_order(x)) else x.contiguous()
