"""Write `metrics.json`, which records what a command did and measured, beside its output."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from d2f_fast.files.atomic import StrPath
from d2f_fast.files.json_file import write_json
from d2f_fast.files.memory import peak_resident_bytes

RECORD_FILE = "metrics.json"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def write_run_record(
    folder: StrPath, command: str, seed: int, seconds: float, results: Sequence[Mapping[str, object]]
) -> Path:
    """Write `metrics.json` into a folder, whole or not at all.

    Versions, device and peak memory are added to what the arguments say. The peak is that of the GPU's memory where
    there is one, and of this process otherwise.

    Args:
        folder: Output folder of the command, which must exist.
        command: Words of the command, such as "d2f sample".
        seed: Seed of the run.
        seconds: Wall-clock time that the command took, in seconds.
        results: One row for each thing that was measured. A row of samples has "objective", "adapter", "sampler",
            "steps", "frechet_distance" and "samples".

    Returns:
        Path of the file.

    Raises:
        ValueError: A result is NaN or infinite.
        RefusedInputError: The disk is full.
    """
    on_gpu = torch.cuda.is_available()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    path = Path(folder) / RECORD_FILE
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
