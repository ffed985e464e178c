"""Read and write safetensors files one tensor at a time, so that a model need not fit into memory.

A `LazyTensor` knows its type and shape, and is computed only when it is written. Files are written in one fixed order,
so that the same tensors and entries give the same bytes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2f_fast.errors import CheckpointError, printable
from d2f_fast.files.atomic import StrPath, atomic_path
from d2f_fast.files.tensor_header import TensorInfo, read_tensor_header

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """Describe a tensor that is read or computed when it is needed.

    Attributes:
        shape: Lengths of its dimensions.
        dtype: Its type.
        load: Function that returns the tensor, on any device, of this type and shape.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """Return a tensor that is in memory already in this form."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype | None) -> "LazyTensor":
        """Return the tensor in another type; None, and integers, stay as they are.

        Args:
            dtype: Floating-point type, or None.
        """
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.load().to(dtype))

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> "LazyTensor":
        """Return the result of a function of the tensor, which keeps its type.

        Args:
            function: Function of the tensor.
            shape: Shape of the result.
        """
        return LazyTensor(shape, self.dtype, lambda: function(self.load()))


def lazy_tensors(path: StrPath) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, none of them read yet, and the text entries of its header.

    Args:
        path: File to read; it must not change while the tensors are used.

    Raises:
        CheckpointError: The file is missing, damaged or a pickle, or a tensor has a type that is not known here.
    """
    header = read_tensor_header(path)
    unknown = [key for key, info in header.tensors.items() if info.dtype not in _DTYPES]
    if unknown:
        raise CheckpointError(
            f"{printable(path)}: {printable(unknown[0])} is of type {header.tensors[unknown[0]].dtype}: give a model"
            " in float32, float16 or bfloat16"
        )
    return {key: _lazy_tensor(Path(path), info) for key, info in header.tensors.items()}, header.entries


def write_tensor_stream(
    path: StrPath, tensors: Mapping[str, LazyTensor], entries: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, with one tensor in memory at a time.

    Args:
        path: File to write or replace.
        tensors: Tensors by key.
        entries: Text entries of the header; None for none.

    Raises:
        CheckpointError: A floating-point tensor holds NaN or an infinity; nothing is written.
        RefusedInputError: The disk is full.
    """
    # Larger elements come first, so that every tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(sorted(entries.items()))} if entries else {}
    position = 0
    for key in order:
        shape, dtype = tensors[key].shape, tensors[key].dtype
        end = position + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = tensors[key].load().detach().to("cpu").contiguous()
            if tensor.dtype != tensors[key].dtype or tuple(tensor.shape) != tensors[key].shape:
                raise AssertionError(f"{key} is not of the type and shape that were announced")
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise CheckpointError(
                    f"{path}: {printable(key)} holds NaN, infinity or a number too large for {_NAMES[tensor.dtype]},"
                    " and nothing is written: give an intact model, or a type of larger range (bf16, fp32)"
                )
            # An empty tensor has no bytes, and numpy would refuse to view it.
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()


def _lazy_tensor(path: Path, info: TensorInfo) -> LazyTensor:
    """Return a tensor of a file, which is read each time that it is loaded."""
    dtype = _DTYPES[info.dtype]

    def load() -> Tensor:
        data = bytearray(info.size)
        with path.open("rb") as file:
            file.seek(info.start)
            if file.readinto(data) != info.size:
                raise CheckpointError(f"{printable(path)}: changed while it was read; run again")
        if not data:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)

    return LazyTensor(info.shape, dtype, load)
