"""Which implementation of a kernel runs: Triton on a GPU, the plain torch reference everywhere else.

Triton is imported at the first question, never by importing this module: without Triton or without a GPU the package
works, on the reference.
"""

import functools
import logging
import os
from typing import Literal

import torch

logger = logging.getLogger(__name__)

# Every op is defined in its kernel's file: CPU runs the reference, CUDA the kernel. The ops are private: called on a
# tensor that requires grad they give none, without a word; the public functions go through autograd.Function.
library = torch.library.Library("d2f_fast", "FRAGMENT")

# Triton's interpreter, in which kernels run on the CPU for tests, computes bfloat16 on bit patterns: they upcast there.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


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
