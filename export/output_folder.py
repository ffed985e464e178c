"""The output folder's life: what may be replaced, what a killed run left, and the rename at the end.

output/                       not there, or a complete export that passed
.tmp-PID-output/              being made; removed when the process ends, or by the next export after a kill
.old-PID-output/              being replaced; put back by the next export after a kill between the two renames
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.verify import VerificationError

REPORT = "export.json"
# What tracing, conversion and ONNX Runtime take beside the weights.
_WORKING_BYTES = 700 * 2**20


def check_place(output: Path) -> None:
    """Refuse a place where no finished folder could be renamed to, before anything is made for it."""
    if Path.cwd().is_relative_to(output):
        raise RefusedInputError(f"output {output} is the current folder, or holds it: name a new folder")
    if output.is_mount():
        raise RefusedInputError(f"output {output} is a mount point, which cannot be replaced: name a folder in it")
    parent = _existing_parent(output)
    if not parent.is_dir():
        raise RefusedInputError(f"output {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RefusedInputError(f"output {output} cannot be made: {parent} is not writable")


def check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise RefusedInputError(f"output folder {output} is not empty: name another, or give --overwrite")
        if not (output / REPORT).is_file():
            raise RefusedInputError(f"output folder {output} holds no export ({REPORT} is missing): remove it yourself")
    elif output.exists() and not output.is_dir():
        raise RefusedInputError(f"output {output} is a file: name a folder")


def check_manifest(folder: Path) -> None:
    """Refuse a folder whose files are not those that its report lists."""
    if not (folder / REPORT).is_file():
        raise RefusedInputError(f"{folder} holds no export: {REPORT} is missing")
    try:
        files = dict(json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedInputError(f"{folder / REPORT} is no report of an export: export again") from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise RefusedInputError(f"{path} is missing or not what was exported: export again")


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_memory_to_load(model: str) -> None:
    """Refuse a local model whose float32 weights do not fit, before they are read; of a hub id nothing is known yet."""
    path, free = Path(model), available_memory_bytes()
    files = _loaded_files(path) if path.is_dir() else [path] if path.is_file() else []
    parameters = 0
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # the loader says what is wrong with it
    if free is not None and 4 * parameters > free:
        raise RefusedInputError(
            f"{path.name} takes {4e-9 * parameters:.1f} GB of memory in float32, have {free / 1e9:.1f}: make room"
        )


def _loaded_files(folder: Path) -> list[Path]:
    """Weights of a pipeline's folder that are read: no variants (fp16, non_ema), and no safety checker."""
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
        found = []
        for part in set(parts) - {"safety_checker"}:
            for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
                shards = folder / part / f"{name}.index.json"
                if (folder / part / name).is_file():
                    found.append(folder / part / name)
                elif shards.is_file():
                    names = set(json.loads(shards.read_bytes())["weight_map"].values())
                    found += [folder / part / shard for shard in names]
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return []  # the loader says what is wrong with it


def check_resources(weights: dict[str, int], output: Path) -> None:
    """Refuse early what would run out of memory (the model is loaded already) or of disk."""
    # ONNX Runtime holds one graph at a time, and packs a copy of its weights.
    memory, disk = 2 * max(weights.values(), default=0) + _WORKING_BYTES, int(1.1 * sum(weights.values())) + 2**20
    free_memory, free_disk = available_memory_bytes(), shutil.disk_usage(_existing_parent(output)).free
    if disk > free_disk or (free_memory is not None and memory > free_memory):
        have = "?" if free_memory is None else f"{free_memory / 1e9:.1f}"
        raise RefusedInputError(
            f"need {memory / 1e9:.1f} GB of free memory and {disk / 1e9:.1f} GB of disk, have {have} and"
            f" {free_disk / 1e9:.1f}: make room, or export fewer components at a time"
        )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def recover(output: Path) -> None:
    """Tidy up after an export to the same folder that was killed: put back what it was replacing, drop what it made."""
    parent = output.absolute().parent
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        found = re.fullmatch(rf"\.(old|tmp)-(\d+)-{re.escape(output.name)}", path.name)
        if found is None or _is_running(int(found[2])):
            continue
        if found[1] == "old" and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def temporary_folder(output: Path, keep_failed: bool) -> Iterator[Path]:
    """A new hidden folder beside the output; however the block ends, it is gone afterwards or is the output."""
    parent = output.absolute().parent
    folder = parent / f".tmp-{os.getpid()}-{output.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    except VerificationError as error:
        if not keep_failed:
            raise
        kept = parent / f"{output.name}-failed"
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
        raise VerificationError(f"{error}; the graphs are in {kept}") from error
    except OSError as error:
        raise RefusedInputError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def into_place(folder: Path, output: Path) -> None:
    """Rename a finished folder; an export that it replaces goes only when it stands."""
    old = output.absolute().with_name(f".old-{os.getpid()}-{output.name}")
    if output.exists():
        output.rename(old)
    folder.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
