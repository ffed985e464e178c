"""Read and write safetensors files: nothing unpickles, and tensors that are not finite are never written."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2f_fast.errors import CheckpointError
from d2f_fast.files.atomic import StrPath, atomic_path


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and strides to a safetensors file, atomically.

    Raises:
        CheckpointError: a floating tensor holds NaN or an infinity; nothing is written.
        RefusedInputError: the disk is full.
    """
    for key, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {key} holds NaN or infinity and is not written; resume from an earlier checkpoint"
            )
    # Own contiguous copies: safetensors refuses views, and tensors that share memory.
    copies = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(copies, temporary, metadata=None if metadata is None else dict(metadata))
        temporary.chmod(mode)  # safetensors leaves 0600 whatever the umask, so that nobody else could read a LoRA


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, on the CPU, and its metadata.

    Raises:
        CheckpointError: the file is missing, damaged, or a pickle.
    """
    with _opened(Path(path)) as file:
        return {key: file.get_tensor(key) for key in file.offset_keys()}, file.metadata() or {}


def read_metadata(path: StrPath) -> dict[str, str]:
    """Read the metadata of a safetensors file alone.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    with _opened(Path(path)) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, and say in one line what is wrong with it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        with path.open("rb") as stream:
            pickled = re.match(rb"PK\x03\x04|\x80[\x02-\x05]", stream.read(4))
        if pickled:
            raise CheckpointError(f"{path}: a pickle, which can run code; convert it to safetensors") from error
        raise CheckpointError(f"{path}: no intact safetensors ({error}); restore it from an intact copy") from error
