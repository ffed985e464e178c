"""Compile the LoRA kernels of the dispatch table for GPUs that are absent, and print the reports as JSON.

    python tests/kernels/aot_lora_linear.py 80,90 16,48,128        # capabilities, ranks

A rank that is not a bucket, as 48 of q, k and v packed, is padded in registers. Entries that share their blocks are one
kernel: of the features, which are compile-time constants, a kernel uses only that its blocks divide them.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # a script has no checkout on its path

from aot import SHARED_MEMORY, compile_for  # noqa: E402

from d2f_fast.kernels import lora_kernels  # noqa: E402
from d2f_fast.kernels.lora_dispatch import NARROW_TABLE, TABLE, rank_bucket  # noqa: E402

POINTER = "*bf16"


def compiled(kernel, capability, constants, tile, **float32):  # type: ignore[no-untyped-def]
    """Return the report on a kernel whose arguments are aligned as in the launches."""
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: "i32" if name == "rows" else float32.get(name, POINTER) for name in names}
    pointers = [name for name in names if name != "rows"]
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    report = compile_for(kernel, capability, types, constants, pointers, **options)
    return {**report, "shared_limit": SHARED_MEMORY[capability]}


def reports(capability: int, rank: int) -> dict[str, dict[str, int]]:
    common = {"RANK": rank, "R": rank_bucket(rank), "UPCAST": False}
    narrow = NARROW_TABLE[capability, rank_bucket(rank)]
    wide = {
        (tile, features, transposed)
        for (cc, n, k, bucket), entry in TABLE.items()
        if (cc, bucket) == (capability, rank_bucket(rank))
        for tile, features, transposed in ((entry.forward, n, False), (entry.grad_x, k, True))
    }
    found = {}
    for tile, transposed in sorted({(tile, transposed) for tile, _, transposed in wide}):
        n, k = max(features for t, features, _ in wide if t == tile), 640
        constants = {
            **{"N": n, "K": k, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": lora_kernels.GROUP},
            **{"STRIDE_WEIGHT_N": 1 if transposed else k, "STRIDE_WEIGHT_K": n if transposed else 1},
            **{"STRIDE_B_N": 1 if transposed else rank, "STRIDE_B_RANK": n if transposed else 1},
            **{"HAS_BIAS": not transposed, **common},
        }
        name = f"sm_{capability} wide r{rank} {tuple(tile)} {'dx' if transposed else 'y'}"
        found[name] = compiled(lora_kernels._wide_kernel, capability, constants, tile)
    for transposed in (False, True):
        tile, k = narrow.shrink, 640
        strides = {"STRIDE_A_RANK": 1 if transposed else k, "STRIDE_A_K": rank if transposed else 1}
        constants = {"K": k, "BLOCK_M": tile.m, "BLOCK_K": tile.k, **strides, **common}
        name = f"sm_{capability} narrow r{rank} {tuple(tile)} {'ds' if transposed else 's'}"
        found[name] = compiled(lora_kernels._narrow_kernel, capability, constants, tile)
    tile = narrow.rows_sum
    constants = {"N": 640, "BLOCKS": lora_kernels.BLOCKS, "BLOCK_M": tile.m, "BLOCK_N": tile.n, **common}
    name = f"sm_{capability} rows_sum r{rank} {tuple(tile)}"
    found[name] = compiled(lora_kernels._rows_sum_kernel, capability, constants, tile, part_ptr="*fp32")
    if narrow.grad_b is not None:
        tile = narrow.grad_b
        constants = {"N": 640, "BLOCK_M": tile.m, "BLOCK_N": tile.n, **common}
        name = f"sm_{capability} grad_b r{rank} {tuple(tile)}"
        found[name] = compiled(lora_kernels._grad_b_kernel, capability, constants, tile, part_ptr="*fp32")
    return found


if __name__ == "__main__":
    capabilities, ranks = ([int(number) for number in argument.split(",")] for argument in sys.argv[1:])
    print(json.dumps({n: r for cc in capabilities for rank in ranks for n, r in reports(cc, rank).items()}))
