"""Read and write safetensors files. No pickle is read, and tensors that are not finite are never written."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2f_fast.errors import CheckpointError
from d2f_fast.files.atomic import StrPath, atomic_path


class _OpenFile(Protocol):
    """The methods of an open safetensors file that are used here; the library's own are not typed."""

    def offset_keys(self) -> list[str]: ...
    def get_tensor(self, key: str) -> Tensor: ...
    def metadata(self) -> dict[str, str] | None: ...


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all. The same tensors and entries give the same bytes.

    Args:
        path: File to write or replace.
        tensors: Tensors of any device, strides and type, by key.
        metadata: Text entries of the file's header; None for no header.

    Raises:
        CheckpointError: A floating-point tensor holds NaN or an infinity; nothing is written.
        RefusedInputError: The disk is full.
    """
    for key, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {key} holds NaN or infinity and is not written; resume from an earlier checkpoint"
            )
    # safetensors refuses views and tensors that share memory, so each tensor is copied into plain layout.
    copies = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(copies, temporary, metadata=None if metadata is None else dict(metadata))
        _sort_metadata(temporary)
        temporary.chmod(mode)  # safetensors sets 0600 whatever the umask, and nobody else could read a shared LoRA.


def _sort_metadata(path: Path) -> None:
    """Sort the text entries in a file's header, which safetensors writes in random order; tensors stay in place."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:  # Only another way of escaping characters could do this.
            raise CheckpointError(
                f"{path}: the sorted header does not fit: leave control characters out of its entries"
            )
        file.seek(8)
        file.write(text.ljust(size))


def read_tensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: File to read.

    Returns:
        Its tensors, on the CPU, and the text entries of its header.

    Raises:
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    with _open(Path(path)) as file:
        return {key: file.get_tensor(key) for key in file.offset_keys()}, file.metadata() or {}


def read_metadata(path: StrPath) -> dict[str, str]:
    """Read the text entries in the header of a safetensors file, and none of its tensors.

    Args:
        path: File to read.

    Raises:
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    with _open(Path(path)) as file:
        return file.metadata() or {}


@contextmanager
def _open(path: Path) -> Iterator[_OpenFile]:
    """Open a safetensors file, and turn every error into one line that names the file."""
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
        raise CheckpointError(
            f"{path}: not an intact safetensors file ({error}); restore it from an intact copy"
        ) from error
