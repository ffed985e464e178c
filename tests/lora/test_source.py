"""LoRA files found from what a user types, and refused before torch is imported."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.lora.source import (
    KOHYA_ENDING,
    LORA_FILE,
    PEFT_FILE,
    check_lora_file,
    lora_path,
    parse_lora,
)


def file_of(path: Path, header: bytes = b"{}") -> Path:
    """Write a safetensors file without tensors."""
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


@pytest.mark.parametrize(
    ("entry", "path", "scale"),
    [
        ("run", "run", 1.0),
        ("run:0.8", "run", 0.8),
        ("run:-.5", "run", -0.5),
        ("a:b", "a:b", 1.0),
        ("a:b:2", "a:b", 2.0),
        ("run:1e-1", "run", 0.1),
        ("C:/x.safetensors", "C:/x.safetensors", 1.0),
        (":1", ":1", 1.0),
    ],
)
def test_scale_follows_the_last_colon(entry: str, path: str, scale: float) -> None:
    assert parse_lora(entry) == (Path(path), scale)


def test_path_that_exists_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_lora("run:2") == (Path("run"), 2.0)
    Path("run:2").mkdir()
    assert parse_lora("run:2") == (Path("run:2"), 1.0)
    assert parse_lora("run:2:0.5") == (Path("run:2"), 0.5)


def test_word_in_place_of_a_scale_is_refused(tmp_path: Path) -> None:
    (tmp_path / "y.safetensors:abc").touch()
    assert parse_lora(str(tmp_path / "y.safetensors:abc")).scale == 1.0
    with pytest.raises(ModelError, match=r"LoRA x\.safetensors:abc: 'abc' is not a number: give FILE or FILE:STRENGTH"):
        parse_lora("x.safetensors:abc")


@pytest.mark.parametrize("scale", ["1001", "-1e9", "9" * 400])
def test_scale_is_bounded(scale: str) -> None:
    with pytest.raises(ModelError, match="the scale must be at most 1000"):
        parse_lora(f"run:{scale}")


def test_folder_gives_its_diffusers_file_first_and_else_its_only_kohya_file(tmp_path: Path) -> None:
    kohya, diffusers, peft = tmp_path / f"run{KOHYA_ENDING}", tmp_path / LORA_FILE, tmp_path / PEFT_FILE
    peft.touch()
    assert lora_path(tmp_path) == peft
    kohya.touch()
    assert lora_path(tmp_path) == kohya
    (tmp_path / f"other{KOHYA_ENDING}").touch()
    peft.unlink()
    assert lora_path(tmp_path) == diffusers
    with pytest.raises(ModelError, match=r"holds several files \*_kohya\.safetensors: give one of them"):
        check_lora_file(tmp_path)
    diffusers.touch()
    assert lora_path(tmp_path) == diffusers


def test_good_file_is_accepted_and_returned(tmp_path: Path) -> None:
    file = file_of(tmp_path / LORA_FILE)
    assert check_lora_file(tmp_path) == check_lora_file(file) == file


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nope", None, "nope: there is no such file or folder; check the path"),
        ("x.ckpt", b"", r"x\.ckpt is not safetensors, other formats can run code: convert it to safetensors first"),
        ("x.safetensors", b"PK\x03\x04abcdefgh", "a pickle, which can run code; convert it to safetensors"),
        ("x.safetensors", b"\x80\x02abcdefgh", "a pickle, which can run code; convert it to safetensors"),
        ("x.safetensors", b"", "not an intact safetensors file; download or copy it again"),
        ("x.safetensors", b"<html>, no such page", "not an intact safetensors file; download or copy it again"),
    ],
)
def test_path_without_a_lora_is_refused(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RefusedInputError, match=sentence) as caught:
        check_lora_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_large_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100 * 2**20))
        file.truncate(8 + 100 * 2**20)
    with pytest.raises(ModelError, match=r"its header of 104857600 bytes is larger than 16777216"):
        check_lora_file(tmp_path / "x.safetensors")


def test_folder_without_a_lora_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"the folder holds no {LORA_FILE}: give the folder of a LoRA run"):
        check_lora_file(tmp_path)
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(ModelError, match="the folder holds a whole model, not a LoRA: give it as the model"):
        check_lora_file(tmp_path)
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        file_of(tmp_path / f"checkpoint-{step}" / LORA_FILE)
    with pytest.raises(ModelError, match=r"has not written its LoRA yet: give \S+checkpoint-10, its newest checkpoint"):
        check_lora_file(tmp_path)
    assert check_lora_file(tmp_path / "checkpoint-2") == tmp_path / "checkpoint-2" / LORA_FILE


def test_module_needs_no_torch() -> None:
    code = "import sys, json, d2f_fast.lora.source; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
