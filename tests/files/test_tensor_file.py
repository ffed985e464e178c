"""Safetensors files come back bit for bit, and damaged, non-finite or pickled ones are refused."""

import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_file import read_tensors, write_tensors


def test_tensors_of_any_layout_come_back_bit_equal(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, 5, 3, generator=generator)
    tensors = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "view": base[1:3, :, ::2],
        "expanded": torch.randn(3, 1, generator=generator).expand(3, 7),
        "shared": base,
        "parameter": torch.nn.Parameter(base[0].bfloat16()),
        "scalar": torch.tensor(-0.0, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "half": base.half(),
        "bytes": generator.get_state(),
        "flags": base > 0,
        "count": torch.tensor(2**62 + 1),
    }
    umask = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a.safetensors", tensors, {"d2f.version": "1"})
    finally:
        os.umask(umask)
    read, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"d2f.version": "1"} and read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape, key
        assert read[key].is_contiguous() and torch.equal(read[key], tensor), key
    assert math.copysign(1, read["scalar"]) == -1
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    entries = {f"entry.{number}": f'é "quoted" \\ \n\t\x00\x1f\x7f\u2028 {number}' for number in range(20)}
    written = set()
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        tensors = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.float16)}
        write_tensors(path, tensors, dict(reversed(entries.items())) if number % 2 else entries)
        written.add(path.read_bytes())
    assert len(written) == 1
    read, metadata = read_tensors(path)
    assert metadata == entries and torch.equal(read["b"], torch.arange(3.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_tensor_is_never_written(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"good": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: unet\.conv_in\.weight holds NaN or infinity"):
        write_tensors(path, {"good": torch.zeros(3), "unet.conv_in.weight": torch.tensor([0.0, value]).to(dtype)})
    assert torch.equal(read_tensors(path)[0]["good"], torch.ones(3))


class Payload:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "damage", ["truncated", "header cut", "empty", "huge header", "hostile shape", "folder", "missing"]
)
def test_damaged_tensor_file_is_refused_with_its_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"weight": torch.ones(100)})
    data = path.read_bytes()
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {
                "truncated": data[:-1],
                "header cut": data[:20],
                "empty": b"",
                "huge header": struct.pack("<Q", 2**60) + data[8:],
                "hostile shape": struct.pack("<Q", len(header)) + header,
            }[damage]
        )
    with pytest.raises(CheckpointError, match=r"a\.safetensors: (no such|not an intact safetensors) file") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))], ids=["pt", "pkl"])
def test_pickle_is_named_and_never_run(tmp_path: Path, save: Callable[[Any, Path], Any]) -> None:
    path, trace = tmp_path / "lora.safetensors", tmp_path / "ran"
    save({"weight": Payload(trace)}, path)
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: a pickle, .* convert it to safetensors"):
        read_tensors(path)
    assert not trace.exists()
