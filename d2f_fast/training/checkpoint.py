"""Write and read training state so that a kill or a full disk at any moment loses nothing that was saved before.

    output_dir/checkpoint-500/          a checkpoint: complete, or not there
    output_dir/.tmp-checkpoint-1000/    being written
    output_dir/.old-checkpoint-500/     being replaced or deleted; whole until its first file goes

A checkpoint is filled under the temporary name, brought to disk, described by `manifest.json` (size and sha256 of each
file) and renamed; only then do older ones go. State is safetensors and JSON, which hold no code: nothing is unpickled.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2f_fast.errors import CheckpointError, RefusedInputError

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MAX_JSON_BYTES = 64 * 2**20  # a hostile file must not fill the memory; ours stay below 1 MiB


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `path` at the end of the block, whole or not at all.

    The temporary file lies in the same folder under a hidden name that keeps the suffix. If the block raises, it is
    removed and `path` keeps what it held.

    Raises:
        RefusedInputError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _refuse_full_disk(path, error)
        raise


@contextmanager
def atomic_folder(folder: StrPath) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder` that becomes it at the end of the block, whole or not at all.

    Raises:
        RefusedInputError: `folder` exists, cannot be made, or the disk is full.
    """
    folder = Path(folder)
    if folder.exists():
        raise RefusedInputError(f"{folder} exists: name a new folder, or remove it")
    temporary = make_folder(folder.parent) / f".tmp-{secrets.token_hex(4)}-{folder.name}"
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        temporary.rename(folder)
        _fsync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _refuse_full_disk(folder, error)
        raise


def make_folder(path: StrPath) -> Path:
    """Make a folder, and those above it, where they are missing.

    Raises:
        RefusedInputError: it cannot be made.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedInputError(f"{path} cannot be made a folder ({error.strerror}): name another") from error
    return path


def write_json(path: StrPath, obj: Any) -> None:
    """Write `obj` as JSON in UTF-8, atomically.

    Raises:
        TypeError: `obj` holds something that JSON has no form for.
        ValueError: `obj` holds NaN or an infinity, which JSON readers other than Python's refuse.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: StrPath) -> Any:
    """Read a JSON file of at most 64 MiB.

    Raises:
        CheckpointError: the file is missing, too large, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes; restore it from an intact copy")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, or a number of too many digits
        raise CheckpointError(f"{path}: not JSON ({error}); restore it from an intact copy") from error


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


def save_checkpoint(output_dir: StrPath, step: int, write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Save `output_dir/checkpoint-{step}`, complete or not at all, and return its path.

    Killed at any moment, it leaves a checkpoint that `find_checkpoint` takes: the one before, or the new one; also
    when `step` is saved a second time. One process of a run calls it.

    Args:
        output_dir: made if missing.
        step: number of optimizer steps taken.
        write: fills the empty folder that it is given; what it raises is raised here, with nothing left behind.
        keep: how many checkpoints stay, at least 1, this one and those of lower steps counted; None keeps all.

    Raises:
        CheckpointError: the disk is full.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    output_dir = Path(output_dir)
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".tmp-checkpoint-{step}"
    replaced = output_dir / f".old-checkpoint-{step}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for _, stale in list_checkpoints(output_dir, ".tmp-"):
            shutil.rmtree(stale)
        temporary.mkdir()
        write(temporary)
        _seal(temporary, step)
        if target.exists():
            # No portable call exchanges two folders, so the old one stays in find_checkpoint's sight under this name.
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(target, replaced)
        os.rename(temporary, target)
        _fsync(output_dir)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_full_disk(error):
            newest = [folder for _, folder in list_checkpoints(output_dir)][:1]
            needed = "".join(f"about {_mib(sum(f.stat().st_size for f in c.rglob('*')))} needed, " for c in newest)
            free = _mib(shutil.disk_usage(output_dir).free)
            raise CheckpointError(
                f"{target}: the disk is full, {needed}{free} free; make room or lower checkpoints_total_limit, "
                "then resume: earlier checkpoints are intact"
            ) from error
        raise
    _delete_old(output_dir, step, keep)
    return target


def verify_checkpoint(folder: StrPath) -> int:
    """Check every file of a checkpoint against its manifest, and return the checkpoint's step.

    Raises:
        CheckpointError: the manifest or a file is missing, changed, or outside the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    manifest = read_json(path)
    try:
        version, step = int(manifest["format"]), int(manifest["step"])
        files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's manifest; resume from another checkpoint") from error
    if version != MANIFEST_FORMAT:
        raise CheckpointError(f"{path}: format {version}, {MANIFEST_FORMAT} is known; update d2f_fast")
    for name, size, sha256 in files:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; resume from another checkpoint")
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path}: lists {name!r}, outside the checkpoint; resume from another checkpoint")
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{file}: {found} bytes, {size} were written; resume from another checkpoint")
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file}: its content has changed; resume from another checkpoint")
    return step


def find_checkpoint(output_dir: StrPath, resume_from: StrPath | None) -> Path | None:
    """Find the checkpoint to resume from, verified; None means from the beginning.

    Args:
        output_dir: the run's folder.
        resume_from: None; "latest", the newest checkpoint that is whole; or one checkpoint, by its name in
            `output_dir` or by its path.

    Raises:
        CheckpointError: the checkpoint named is missing or damaged.
    """
    if resume_from is None:
        return None
    output_dir = Path(output_dir)
    if resume_from == "latest":
        for _, folder in sorted(list_checkpoints(output_dir) + list_checkpoints(output_dir, ".old-"), reverse=True):
            try:
                verify_checkpoint(folder)
            except (CheckpointError, OSError) as error:
                if not folder.name.startswith(".old-"):  # half deleted is what such a folder may be
                    logger.warning("%s is skipped: %s", folder.name, error)
            else:
                return folder
        logger.warning("%s: no checkpoint to resume from; the run starts from the beginning", output_dir)
        return None
    named = Path(resume_from)
    for folder in (output_dir / named, named, output_dir / f".old-{named.name}"):
        if folder.is_dir():
            verify_checkpoint(folder)
            return folder
    raise CheckpointError(f'{named}: no such checkpoint in {output_dir}; give one that is there, or "latest"')


def list_checkpoints(output_dir: Path, prefix: str = "") -> list[tuple[int, Path]]:
    """List the folders `{prefix}checkpoint-N` with their N, highest first, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [(re.fullmatch(re.escape(prefix) + r"checkpoint-(\d+)", p.name), p) for p in output_dir.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match and path.is_dir()), reverse=True)


def pack_state(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested state into tensors and a JSON tree that names them, both exact.

    Args:
        state: dicts (keys str, int, float, bool, None or tuples of them), lists, tuples, tensors, str, int, float,
            bool, None, nested. A dict's subclass comes back as a dict.

    Returns:
        Tensors by their path in `state`, for `write_tensors`, and what `write_json` takes.

    Raises:
        TypeError: `state` holds something else.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(state, "state", tensors)


def unpack_state(tensors: Mapping[str, Tensor], state_json: Any) -> Any:
    """Build what `pack_state` took, its tensors as copies on the CPU.

    Raises:
        CheckpointError: `state_json` is not from `pack_state`, or names a tensor that is not in `tensors`.
    """
    try:
        return _unpack(state_json, tensors)
    except KeyError as error:
        raise CheckpointError(f"training state: {error.args[0]} is missing; resume from another checkpoint") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"training state: not understood ({error}); resume from another checkpoint") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Split an optimizer's state into tensors and a JSON tree, both exact, as `pack_state` does."""
    return pack_state(
        {"type": type(optimizer).__name__, "shapes": _shapes(optimizer), "optimizer": optimizer.state_dict()}
    )


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state_json: Any) -> None:
    """Load what `pack_optimizer` took into an optimizer of the same kind over the same parameters.

    Raises:
        CheckpointError: the state is damaged, or from another kind of optimizer, other groups or other shapes.
    """
    packed = unpack_state(tensors, state_json)
    cure = "resume with the settings that the checkpoint was made with"
    if not isinstance(packed, dict) or packed.keys() != {"type", "shapes", "optimizer"}:
        raise CheckpointError("optimizer state: not an optimizer's; resume from another checkpoint")
    if packed["type"] != type(optimizer).__name__:
        raise CheckpointError(
            f"optimizer state: of {packed['type']}, the optimizer is {type(optimizer).__name__}; {cure}"
        )
    if packed["shapes"] != _shapes(optimizer):
        raise CheckpointError(f"optimizer state: its parameters have other groups, numbers or shapes; {cure}")
    state = packed["optimizer"]
    try:
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            for key in saved:  # a learning rate that lives on the device must come back there
                if isinstance(saved[key], Tensor) and isinstance(group.get(key), Tensor):
                    saved[key] = saved[key].to(group[key].device)
        optimizer.load_state_dict(state)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, exact in state["state"].items():
            # load_state_dict puts each tensor on its device, but rounds it to its parameter's dtype.
            parameter = parameters[index]
            restored = _restore_dtype(optimizer.state[parameter], exact)
            optimizer.state[parameter] = {name: _laid_out(value, parameter) for name, value in restored.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"optimizer state: does not fit ({error!r}); {cure}") from error


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space filesystems cannot sync a folder; they keep its names by other means.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _seal(folder: Path, step: int) -> None:
    """Bring every file below `folder` to disk, and write the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        _fsync(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "step": step, "files": files})


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _delete_old(output_dir: Path, step: int, keep: int | None) -> None:
    """Delete replaced and half-deleted checkpoints, and those before `step` beyond `keep`."""
    older = [folder for number, folder in list_checkpoints(output_dir) if number < step]
    try:
        for _, folder in list_checkpoints(output_dir, ".old-"):
            shutil.rmtree(folder)
        for folder in older[keep - 1 :] if keep is not None else ():
            # Renamed first: killed half-way through, it no longer has a checkpoint's name.
            shutil.rmtree(folder.rename(folder.with_name(f".old-{folder.name}")))
    except OSError as error:
        logger.warning("an old checkpoint could not be deleted: %s", error)


def _refuse_full_disk(path: Path, error: BaseException) -> None:
    """Say in one line that the disk is full, if that is why `path` could not be written."""
    if _is_full_disk(error):
        free = _mib(shutil.disk_usage(path.parent).free)
        raise RefusedInputError(f"{path}: the disk is full, {free} free; make room and run again") from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Tell whether an error, or one that caused it, is a full disk or quota; safetensors gives the number as text."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in numbers):
            return True
        error = error.__cause__
    return False


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn `value` into JSON; what JSON has no form for becomes an object with one key that starts with "$"."""
    if isinstance(value, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors are named {name}: keys must differ as text")
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, float):  # Python prints floats so that they are read back bit for bit
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        items = {key: _pack(item, f"{name}.{key}", tensors) for key, item in value.items()}
        if all(type(key) is str and not key.startswith("$") for key in items):
            return items
        return {"$dict": [[_pack(key, f"{name}.key", tensors), item] for key, item in items.items()]}
    if type(value) in (list, tuple):
        packed = [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return packed if type(value) is list else {"$tuple": packed}
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint does not store")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if len(value) == 1 and tag == "$tensor":
        return tensors[value[tag]].clone()  # a copy: the file stays mapped, and state is updated in place
    if len(value) == 1 and tag == "$float":
        return float(value[tag])
    if len(value) == 1 and tag == "$tuple":
        return tuple(_unpack(item, tensors) for item in value[tag])
    if len(value) == 1 and tag == "$dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value[tag]}
    raise ValueError(f"unknown tag {tag}")


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """List the parameters' shapes, group by group."""
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A state tensor with its parameter's strides: a file has none, and fused optimizers pair memory, not elements."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _restore_dtype(loaded: Any, exact: Any) -> Any:
    """Take values from `exact`, and the devices of its tensors from `loaded`."""
    if isinstance(exact, Tensor):
        return loaded if loaded.dtype == exact.dtype else exact.to(loaded.device)
    if isinstance(exact, dict):
        return {key: _restore_dtype(loaded[key], item) for key, item in exact.items()}
    if isinstance(exact, list | tuple):
        return type(exact)(_restore_dtype(*pair) for pair in zip(loaded, exact, strict=True))
    return exact
