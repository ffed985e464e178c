"""Headers of safetensors files, against safetensors' own reader, and refusals of damaged files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import CheckpointError
from d2f_fast.files.tensor_header import read_tensor_header


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_types_shapes_and_entries_are_those_that_were_written(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(()), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_tensor_header(tmp_path / "a.safetensors")
    got = {key: (info.dtype, info.shape, info.size, info.elements) for key, info in header.tensors.items()}
    assert got == {"a": ("F16", (2, 3), 12, 6), "b": ("F32", (), 4, 1), "c": ("F32", (0,), 0, 0)}
    assert header.entries == {"format": "pt"}


def test_place_of_a_tensor_is_that_of_its_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3, dtype=torch.uint8), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    info = read_tensor_header(tmp_path / "a.safetensors").tensors["a"]
    assert (tmp_path / "a.safetensors").read_bytes()[info.start : info.start + info.size] == b"\x00\x01\x02"


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"__metadata__": {"a": 1}},
        {"__metadata__": "a"},
    ],
    ids=str,
)
def test_header_that_contradicts_itself_or_the_file_is_refused(header: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an intact safetensors file") as caught:
        read_tensor_header(raw(tmp_path / "a.safetensors", header, bytes(4)))
    assert "\n" not in str(caught.value)


def test_missing_file_pickle_and_long_header_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensor_header(tmp_path / "none.safetensors")
    torch.save({}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        read_tensor_header(tmp_path / "a.safetensors")
    for content in (b"", b"\xff" * 12):
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="its header would be"):
            read_tensor_header(tmp_path / "b.safetensors")
    with (tmp_path / "c.safetensors").open("wb") as file:  # 100 MB that no disk holds
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="its header would be 100000000 bytes long"):
        read_tensor_header(tmp_path / "c.safetensors")
