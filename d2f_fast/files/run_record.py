"""`metrics.json`: what a command did and measured, beside what it made."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from d2f_fast.files.json_file import write_json
from d2f_fast.files.memory import peak_resident_bytes

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def write_metrics(
    folder: str | Path, command: str, seed: int, seconds: float, results: Sequence[Mapping[str, Any]]
) -> Path:
    """Write `metrics.json` into a folder, atomically.

    Args:
        folder: of the command's output.
        command: the command line's words.
        seed: of the run.
        seconds: wall time.
        results: a row for each thing measured; a sampling row has "objective", "adapter", "sampler", "steps",
            "frechet_distance" and "samples".

    Returns:
        Path of the file.
    """
    on_gpu = torch.cuda.is_available()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    path = Path(folder) / "metrics.json"
    write_json(
        path,
        {
            "command": command,
            "seed": seed,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "device": torch.cuda.get_device_name() if on_gpu else cpu,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
            "results": list(results),
        },
    )
    return path
