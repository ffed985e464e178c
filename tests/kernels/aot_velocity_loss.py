"""Compile the loss kernels for current GPUs, and print the reports as one JSON object."""

import inspect
import json
import sys
from typing import Any

from aot import compile_for

from d2f_fast.kernels.velocity_loss import BLOCK, NUM_WARPS, SUM_BLOCK, _error_kernel, _sum_kernel

DTYPES = {"output_ptr", "latents_ptr", "noise_ptr"}
FLOATS = {"t_min", "t_max", "from_t_max", "from_t_min", "snr_gamma"}
NOT_DIVISIBLE = FLOATS | {"blocks"}  # 8 blocks at 4 x 64 x 64


def report(kernel: Any, capability: int, num_warps: int, dtype: str, mask: str, constexprs: dict) -> dict[str, int]:
    types = {}
    for name in inspect.signature(kernel.fn).parameters:
        pointed = dtype if name in DTYPES else mask if name == "mask_ptr" else "fp32"
        types[name] = f"*{pointed}" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"
    constexprs |= {"stride_t": 1}
    divisible = [name for name in types if name not in NOT_DIVISIBLE | constexprs.keys()]
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return compile_for(kernel, capability, types, constexprs, divisible, **options)


def error_report(
    capability: int, dtype: str, prediction_type: str, mask: str = "", flat: bool = True
) -> dict[str, int]:
    """Return the report on the error kernel; unless `flat`, the output is channels_last beside contiguous operands."""
    fastest = 2 if flat else 1
    constexprs: dict[str, Any] = {
        "PREDICTION_TYPE": prediction_type,
        "LATENTS_FLAT": flat,
        "NOISE_FLAT": flat,
        "MASKED": bool(mask),
        "STORE_ERROR": True,
        "BLOCK": BLOCK,
    }
    constexprs |= {f"stride_{name}_{fastest}": 1 for name in ("latents", "noise", "mask")}
    if not flat:
        constexprs["size_2"] = 4  # the channels, which 16 does not divide
    return report(_error_kernel, capability, NUM_WARPS, dtype, mask or "u8", constexprs)


def sum_report(capability: int, masked: bool) -> dict[str, int]:
    constexprs = {"PREDICTION_TYPE": "epsilon", "WEIGHTING": "min_snr", "MASKED": masked}
    constexprs |= {"BLOCKS": 4096, "SUM_BLOCK": SUM_BLOCK}
    return report(_sum_kernel, capability, 4, "fp32", "u8", constexprs)


reports = {}
for capability in map(int, sys.argv[1].split(",")):
    for dtype, prediction_type in (("bf16", "epsilon"), ("fp16", "v_prediction"), ("fp32", "sample")):
        reports[f"sm_{capability} {dtype}"] = error_report(capability, dtype, prediction_type)
    reports[f"sm_{capability} bool mask"] = error_report(capability, "bf16", "flow_prediction", "u8")
    reports[f"sm_{capability} channels_last"] = error_report(capability, "bf16", "epsilon", "fp32", flat=False)
    reports[f"sm_{capability} sum"] = sum_report(capability, masked=True)
print(json.dumps(reports))
