"""Compile the alignment kernel for current GPUs, and print the reports as one JSON object."""

import json
import sys

from aot import compile_for

from d2f_fast.kernels.align import BLOCK, NUM_WARPS, _align_kernel

POINTERS = ("latents_ptr", "noise_ptr", "t_ptr", "table_ptr", "sample_ptr", "timestep_ptr")
COUNTS = (
    "num_train_timesteps",
    "elements",
    "blocks",
    "size_1",
    "size_2",
    "stride_latents_b",
    "stride_noise_b",
    "stride_noise_0",
    "stride_noise_1",
    "stride_noise_2",
    "stride_t",
)


def report(capability: int, dtype: str, flat: bool, aligned: bool = True) -> dict[str, int]:
    types = {name: f"*{dtype}" for name in POINTERS} | dict.fromkeys(COUNTS, "i32") | {"t_min": "fp32"}
    types |= dict.fromkeys(("t_ptr", "table_ptr", "timestep_ptr"), "*fp32")
    constexprs = {"ALIGNED": aligned, "NOISE_FLAT": flat, "TABLE_BLOCK": 1024, "BLOCK": BLOCK, "stride_t": 1}
    constexprs["stride_noise_2" if flat else "stride_noise_1"] = 1  # otherwise one operand is channels_last
    # Arguments divisible by 16 in a launch at 4 x 64 x 64: 1000 timesteps and 8 blocks are not among them.
    divisible = [*POINTERS, "elements", "size_1", "size_2", "stride_latents_b", "stride_noise_b"]
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return compile_for(_align_kernel, capability, types, constexprs, divisible, **options)


reports = {}
for capability in map(int, sys.argv[1].split(",")):
    for dtype in ("bf16", "fp16", "fp32"):
        reports[f"sm_{capability} {dtype}"] = report(capability, dtype, flat=True)
    reports[f"sm_{capability} naive, strided"] = report(capability, "bf16", flat=False, aligned=False)
print(json.dumps(reports))
