"""Read the header of a safetensors file: the type, shape and place of each tensor. No tensor is read, and no torch.

file = 8 bytes: length n of the header, little-endian | n bytes: JSON | the tensors' bytes
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_fast.errors import CheckpointError, printable
from d2f_fast.files.atomic import StrPath

# That of SDXL is below 1 MB, and a thumbnail adds a few. safetensors allows 100 MB, which take a minute to read.
MAX_HEADER_BYTES = 16 * 2**20
BYTES_OF_DTYPE = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")


@dataclass(frozen=True)
class TensorInfo:
    """Describe one tensor of a file.

    Attributes:
        dtype: Type in the words of safetensors, such as "F32" or "BF16".
        shape: Lengths of the dimensions; empty for a single number.
        start: Position of its first byte in the file.
        size: Number of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorHeader:
    """Describe a safetensors file.

    Attributes:
        tensors: Description of each tensor by key, in the order of their bytes.
        entries: Text entries.
    """

    tensors: dict[str, TensorInfo]
    entries: dict[str, str]


def read_tensor_header(path: StrPath) -> TensorHeader:
    """Read and check the header of a safetensors file.

    Args:
        path: File to read.

    Raises:
        CheckpointError: The file is missing, damaged, cut short, or a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{printable(path)}: no such file; check the path")
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if _PICKLE.match(length_bytes):
            raise CheckpointError(f"{printable(path)}: a pickle, which can run code; convert it to safetensors")
        length, size = int.from_bytes(length_bytes, "little"), path.stat().st_size
        if len(length_bytes) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, f"its header would be {length} bytes long")
        text = file.read(length)
    try:
        content = json.loads(text)
        entries = content.pop("__metadata__", None) or {}
        tensors = {key: _tensor_info(value, 8 + length, size) for key, value in content.items()}
        if not all(isinstance(value, str) for value in entries.values()):
            raise ValueError("an entry is not text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return TensorHeader(dict(sorted(tensors.items(), key=lambda item: item[1].start)), dict(entries))


def _tensor_info(value: Any, data_start: int, file_size: int) -> TensorInfo:
    """Return the description of one tensor, or raise ValueError where it contradicts itself or the file."""
    dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"shape {shape} or place {start}, {end} is not of whole numbers")
    info = TensorInfo(str(dtype), shape, data_start + start, end - start)
    if info.start + info.size > file_size:
        raise ValueError("the file is cut short")
    if dtype in BYTES_OF_DTYPE and info.size != info.elements * BYTES_OF_DTYPE[dtype]:
        raise ValueError(f"{info.size} bytes do not hold {list(shape)} of {dtype}")
    return info


def _damaged(path: Path, problem: str) -> CheckpointError:
    """Return the error for a file that is not an intact safetensors file."""
    return CheckpointError(
        f"{printable(path)}: not an intact safetensors file ({printable(problem)}); restore it from an intact copy"
    )
