"""Run `d2f` with bfloat16 products that are computed in float32, and print the peak of its memory.

full_size_run.py COMMAND OPTIONS...

A CPU without instructions for bfloat16 takes 50 times as long for a product in it as for one in float32. The float32
product, rounded once, is what those instructions give, and needs the memory of one layer more.
"""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from d2f_fast.commands.main import main

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)


class Float32Products(TorchDispatchMode):
    """Compute products of bfloat16 tensors in float32, and round the result."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket not in PRODUCTS or not any(is_bfloat16(value) for value in args):
            return func(*args, **(kwargs or {}))
        exact = tree_map_only(torch.Tensor, lambda x: x.float() if is_bfloat16(x) else x, args)
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, func(*exact, **(kwargs or {})))


def is_bfloat16(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def watched(done: threading.Event, peak: list[int]) -> Callable[[], None]:
    """Return a function that keeps the largest amount of memory that is no page of a file, in kB."""

    def watch() -> None:
        while not done.wait(0.05):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], *(int(number) for number in re.findall(r"RssAnon:\s*(\d+)", status)))

    return watch


if __name__ == "__main__":
    done, peak = threading.Event(), [0]
    thread = threading.Thread(target=watched(done, peak), daemon=True)
    thread.start()
    with Float32Products():
        code = main(sys.argv[1:])
    done.set()
    thread.join()
    (high_water,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    print(f"{peak[0]} {high_water}")
    sys.exit(code)
