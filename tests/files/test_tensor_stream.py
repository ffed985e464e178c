"""Safetensors files read and written one tensor at a time, against safetensors' own reader and writer."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_stream import LazyTensor, lazy_tensors, write_tensor_stream

TENSORS = {
    "half": torch.randn(3, 2).half(),
    "brain": torch.randn(5).bfloat16(),
    "single": torch.randn(2, 1, 3),
    "number": torch.tensor(4.0),
    "empty": torch.empty(0),
    "count": torch.arange(7),
}


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {key: LazyTensor.of(value) for key, value in tensors.items()}


def test_written_file_is_read_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensor_stream(path, lazy(TENSORS), {"format": "pt", "b": "ü", "a": "1"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(read[key].dtype == TENSORS[key].dtype and torch.equal(read[key], TENSORS[key]) for key in read)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "b": "ü", "a": "1"}


def test_file_of_safetensors_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"a": "1"})
    tensors, entries = lazy_tensors(tmp_path / "a.safetensors")
    assert entries == {"a": "1"}
    for key, value in TENSORS.items():
        assert (tensors[key].shape, tensors[key].dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(tensors[key].load(), value)


def test_order_of_tensors_and_entries_does_not_change_the_bytes(tmp_path: Path) -> None:
    write_tensor_stream(tmp_path / "a", lazy(TENSORS), {"a": "1", "b": "2"})
    write_tensor_stream(tmp_path / "b", lazy(dict(reversed(TENSORS.items()))), {"b": "2", "a": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_type_and_function_apply_when_the_tensor_is_loaded(tmp_path: Path) -> None:
    tensor = LazyTensor.of(TENSORS["single"])
    changed = tensor.map(lambda value: value.flatten(), (6,)).to(torch.bfloat16)
    assert (changed.shape, changed.dtype) == ((6,), torch.bfloat16)
    assert torch.equal(changed.load(), TENSORS["single"].flatten().bfloat16())
    count = LazyTensor.of(TENSORS["count"])
    assert count.to(torch.float16) is count and tensor.to(None) is tensor


def test_tensor_is_loaded_when_it_is_written_and_not_before(tmp_path: Path) -> None:
    held: list[int] = []

    def load() -> torch.Tensor:
        held.append(1)
        return torch.ones(2)

    tensors = {str(i): LazyTensor((2,), torch.float32, load) for i in range(3)}
    assert not held
    write_tensor_stream(tmp_path / "a", tensors)
    assert len(held) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_number_that_is_not_finite_in_the_type_leaves_the_old_file(value: float, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    tensors = {"ok": LazyTensor.of(torch.ones(2)), "bad": LazyTensor.of(torch.tensor([value])).to(torch.float16)}
    with pytest.raises(CheckpointError, match="bad holds NaN, infinity or a number too large for F16"):
        write_tensor_stream(tmp_path / "a", tensors)
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="a is of type F4: give a model in float32, float16 or bfloat16"):
        lazy_tensors(tmp_path / "a")
