"""Compile a Triton kernel for a GPU that is absent, and count its registers, spills and memory accesses.

The scripts `aot_<kernel>.py` import it and run in processes of their own, because TRITON_INTERPRET must be unset when a
kernel is decorated.
"""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability").
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}

# A copy of 16 bytes to shared memory, whose size PTX writes as a hexadecimal or a decimal number.
WIDE_COPY = r"cp\.async\.cg[^;]*\], (?:0x10|16)\b"


def compile_for(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    aligned: Iterable[str],
    **options: Any,
) -> dict[str, int]:
    """Compile a kernel, and return counts of its resources and instructions.

    Args:
        kernel: a `triton.jit` function.
        capability: 90 for sm_90.
        types: types of the runtime arguments: "*bf16", "fp32", "i32", ….
        constexprs: values of the other arguments.
        aligned: names of arguments that are divisible by 16 in the launch, which allows vectorised accesses.
        options: compiler options, as num_warps and num_stages.

    Returns:
        Registers and stack bytes of a thread, spill instructions, bytes of shared memory, and instruction counts.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constexprs else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, tool = compiled.asm["ptx"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4", ptx)) + len(re.findall(WIDE_COPY, ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "wgmma_bf16": len(re.findall(r"wgmma\.mma_async[\w.]*\.bf16\.bf16", ptx)),
        "mma": len(re.findall(r"(?<!wg)mma\.sync", ptx)),
    }
