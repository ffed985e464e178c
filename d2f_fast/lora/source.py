"""Find the LoRA file that a user names, and refuse what is none, before torch is imported."""

import os.path
import re
import struct
from pathlib import Path
from typing import NamedTuple

from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.atomic import StrPath

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_ENDING = "_kohya.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_SCALE = 1000.0
# Names and shapes of the 2364 tensors of the largest LoRA of SDXL take 0.4 MB.
_MAX_HEADER_BYTES = 16 * 2**20
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


class LoraSource(NamedTuple):
    """A LoRA that a user named.

    Attributes:
        path: File, or folder that holds one.
        scale: Factor on the whole adapter; 1 applies it as it was trained.
    """

    path: Path
    scale: float


def parse_lora(entry: str) -> LoraSource:
    """Return the path and the scale of `PATH` or `PATH:SCALE`.

    Args:
        entry: Text of the user. A path that exists as it stands is taken whole, so that its name may contain a colon.

    Raises:
        ModelError: The scale is larger than 1000 or smaller than -1000, or what follows a file's name is not a number.
    """
    path, _, scale = entry.rpartition(":")
    is_path = path.endswith(".safetensors") or os.path.isdir(path)
    if is_path and not _NUMBER.fullmatch(scale) and not os.path.exists(entry):
        raise ModelError(f"LoRA {printable(entry)}: {printable(scale)!r} is not a number: give FILE or FILE:STRENGTH")
    if not path or not _NUMBER.fullmatch(scale) or os.path.exists(entry):
        return LoraSource(Path(entry), 1.0)
    if not abs(float(scale)) <= MAX_SCALE:
        raise ModelError(f"LoRA {printable(entry)}: the scale must be at most {MAX_SCALE:g}: 1 is the usual strength")
    return LoraSource(Path(path), float(scale))


def lora_identity(sha256: str, scale: float) -> str:
    """Return a short text that differs for another content or scale of a LoRA.

    Args:
        sha256: Hash of its file.
        scale: Factor on the whole adapter.
    """
    return f"{sha256[:16]}:{scale:g}"


def lora_path(source: StrPath) -> Path:
    """Return the path of a LoRA file.

    Args:
        source: The file itself, or the folder of a run, of a checkpoint or of peft that holds one. From a folder,
            `pytorch_lora_weights.safetensors` is taken, else its only file whose name ends in "_kohya.safetensors",
            else peft's `adapter_model.safetensors`.
    """
    path = Path(source)
    if not os.path.isdir(path):  # pathlib's own methods raise where a name is too long
        return path
    if (path / LORA_FILE).exists():
        return path / LORA_FILE
    if len(found := list(path.glob(f"*{KOHYA_ENDING}"))) == 1:
        return found[0]
    return path / (PEFT_FILE if (path / PEFT_FILE).exists() else LORA_FILE)


def check_lora_file(source: StrPath) -> Path:
    """Refuse a path that holds no LoRA file, without reading its tensors, and return the file.

    Args:
        source: File or folder; see `lora_path`.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it is a pickle.
        ModelError: The file is not safetensors, or the folder holds no LoRA.
    """
    path = lora_path(source)
    if not os.path.isfile(path):
        if not os.path.exists(source):
            raise CheckpointError(f"LoRA {printable(source)}: there is no such file or folder; check the path")
        raise ModelError(f"LoRA {printable(source)}: {_reason_for_no_file(Path(source))}")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"LoRA {printable(path)} is not safetensors, other formats can run code: convert it to safetensors first"
        )
    with path.open("rb") as file:
        start = file.read(8)
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
        raise CheckpointError(f"{printable(path)}: a pickle, which can run code; convert it to safetensors")
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < size <= path.stat().st_size - 8:
        raise CheckpointError(
            f"{printable(path)}: not an intact safetensors file; download or copy it again, and check its size"
        )
    if size > _MAX_HEADER_BYTES:
        raise ModelError(
            f"LoRA {printable(path)}: its header of {size} bytes is larger than {_MAX_HEADER_BYTES}, the most that a"
            " LoRA needs: get the file from its author again"
        )
    return path


def _reason_for_no_file(folder: Path) -> str:
    """Return what a folder without a LoRA file holds, and what to give in its place."""
    if len(list(folder.glob(f"*{KOHYA_ENDING}"))) > 1:
        return f"the folder holds several files *{KOHYA_ENDING}: give one of them"
    steps = [
        re.fullmatch(r"checkpoint-(\d{1,18})", file.parent.name) for file in folder.glob(f"checkpoint-*/{LORA_FILE}")
    ]
    if newest := max((int(step[1]) for step in steps if step), default=None):
        checkpoint = folder / f"checkpoint-{newest}"
        return f"the run has not written its LoRA yet: give {printable(checkpoint)}, its newest checkpoint"
    if (folder / "model_index.json").exists() or (folder / "pipeline").exists():
        return "the folder holds a whole model, not a LoRA: give it as the model"
    return f"the folder holds no {LORA_FILE}: give the folder of a LoRA run, or a .safetensors file"
