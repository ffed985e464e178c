"""Write and read training state so that a kill or a full disk at any moment loses nothing that was saved before.

    output_dir/checkpoint-500/          a complete checkpoint
    output_dir/.tmp-checkpoint-1000/    a checkpoint that is being written
    output_dir/.old-checkpoint-500/     a checkpoint that is being replaced or deleted; whole until its first file goes

A checkpoint is filled under the temporary name, brought to disk, described by `manifest.json` (size and sha256 of each
file) and renamed; only then do older ones go. State is safetensors and JSON, which hold no code: nothing is unpickled.
"""

import logging
import operator
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from d2f_fast.errors import CheckpointError, RefusedInputError, printable
from d2f_fast.files.atomic import StrPath, in_mebibytes, is_full_disk, sync_to_disk
from d2f_fast.files.hashes import file_sha256
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.files.tensor_header import read_tensor_header

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def save_checkpoint(output_dir: StrPath, step: int, write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Save `output_dir/checkpoint-{step}`, complete or not at all, and return its path.

    If the process is killed at any moment, `find_checkpoint` finds the previous checkpoint or the new one, also when
    `step` is saved a second time. Only one process of a run may call this function.

    Args:
        output_dir: folder of the run, made where it is missing.
        step: number of optimizer steps taken.
        write: function that fills the empty folder it is given; its errors are raised here, and nothing is left behind.
        keep: number of checkpoints that stay, at least 1: this one and those of the steps before it; None keeps all.

    Raises:
        CheckpointError: the disk is full.
        ValueError: `keep` is below 1.
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
            # No portable call exchanges two folders, so find_checkpoint also looks for the old one under this name.
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(target, replaced)
        os.rename(temporary, target)
        sync_to_disk(output_dir)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_full_disk(error):
            newest = [folder for _, folder in list_checkpoints(output_dir)][:1]
            needed = "".join(
                f"about {in_mebibytes(sum(f.stat().st_size for f in c.rglob('*')))} needed, " for c in newest
            )
            free = in_mebibytes(shutil.disk_usage(output_dir).free)
            raise CheckpointError(
                f"{target}: the disk is full, {needed}{free} free; make room or lower checkpoints_total_limit, "
                "then resume: earlier checkpoints are intact"
            ) from error
        raise
    delete_old_checkpoints(output_dir, step, keep)
    return target


def verify_checkpoint(folder: StrPath, *, contents: bool = True) -> int:
    """Check every file of a checkpoint against its manifest, and return the checkpoint's step.

    Args:
        folder: folder of the checkpoint.
        contents: whether the contents are compared, which are read for it; otherwise the sizes and the headers of
            safetensors files are.

    Raises:
        CheckpointError: the manifest or a file is missing, was changed, or lies outside the folder; or the manifest
            belongs to another step than the folder's name.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    manifest = read_json(path)
    try:
        version, step = int(manifest["format"]), operator.index(manifest["step"])
        files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: resume from another checkpoint") from error
    if version != MANIFEST_FORMAT:
        raise CheckpointError(f"{path} has format {version}, and format {MANIFEST_FORMAT} is known: update d2f_fast")
    named = re.fullmatch(r"(?:\.old-)?checkpoint-(\d+)", folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"{path} has step {step}, and the name of its folder says {named[1]}: resume from another checkpoint"
        )
    for name, size, sha256 in files:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: resume from another checkpoint")
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path} lists {name!r}, outside the checkpoint: resume from another checkpoint")
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{file} has {found} bytes, and {size} were written: resume from another checkpoint")
        if contents and file_sha256(file) != sha256:
            raise CheckpointError(f"{file} was changed after it was written: resume from another checkpoint")
        if not contents and file.suffix == ".safetensors":
            read_tensor_header(file)
    return step


def find_checkpoint(output_dir: StrPath, resume_from: StrPath | None) -> Path | None:
    """Find and verify the checkpoint to resume from, and return its folder; None begins the run from its start.

    Args:
        output_dir: folder of the run.
        resume_from: "latest" for the newest checkpoint that is whole, or one checkpoint by its name in `output_dir` or
            by its path; None for no checkpoint.

    Raises:
        CheckpointError: the named checkpoint is missing or damaged, or "latest" was asked for and all are damaged.
    """
    if resume_from is None:
        return None
    output_dir = Path(output_dir)
    if resume_from == "latest":
        return _find_latest(output_dir)
    return _find_named(output_dir, Path(resume_from), contents=True).folder


class Checkpoint(NamedTuple):
    """A checkpoint that was found.

    Attributes:
        folder: its folder.
        step: number of optimizer steps taken.
    """

    folder: Path
    step: int


def named_checkpoint(output_dir: StrPath, resume_from: StrPath | None) -> Checkpoint | None:
    """Return the checkpoint that `find_checkpoint` would find, without reading the contents of its files.

    Args:
        output_dir: folder of the run.
        resume_from: checkpoint to resume from, as for `find_checkpoint`.

    Returns:
        The checkpoint; None for a new run. `find_checkpoint` takes an older one where the contents are damaged.

    Raises:
        CheckpointError: the named checkpoint is missing or damaged, or "latest" was asked for and all are damaged.
    """
    if resume_from is None:
        return None
    output_dir = Path(output_dir)
    if resume_from == "latest":
        return _newest_whole(output_dir, contents=False)[0]
    return _find_named(output_dir, Path(resume_from), contents=False)


def refuse_used_folder(output_dir: StrPath, resume_from: StrPath | None) -> None:
    """Refuse an output folder with checkpoints or results of an earlier run, which a new run would replace.

    Args:
        output_dir: folder of the run; it need not exist.
        resume_from: checkpoint to resume from, as for `find_checkpoint`; None for a new run.

    Raises:
        RefusedInputError: the folder holds checkpoints, and the run is new; or it holds the result of a run, a
            safetensors file or a pipeline, and neither a checkpoint nor the name of one.
    """
    output_dir = Path(output_dir)
    checkpoints = list_checkpoints(output_dir) + list_checkpoints(output_dir, ".old-")
    if checkpoints and resume_from is None:
        raise RefusedInputError(
            f"{printable(output_dir)} holds {checkpoints[0][1].name} of an earlier run: continue it with"
            " --resume_from_checkpoint latest, or name a new output_dir"
        )
    results = [*sorted(output_dir.glob("*.safetensors")), *output_dir.glob("pipeline/model_index.json")]
    if results and not checkpoints and resume_from in (None, "latest"):
        raise RefusedInputError(
            f"{printable(output_dir)} holds {printable(results[0].relative_to(output_dir))} of a finished run, and no"
            " checkpoint to continue from: name a new output_dir, or move the file away"
        )


def list_checkpoints(output_dir: Path, prefix: str = "") -> list[tuple[int, Path]]:
    """Return the folders `{prefix}checkpoint-N` with their N, highest first, whether or not they are whole."""
    if not output_dir.is_dir():
        return []
    found = [(re.fullmatch(re.escape(prefix) + r"checkpoint-(\d+)", p.name), p) for p in output_dir.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match and path.is_dir()), reverse=True)


def _find_named(output_dir: Path, named: Path, *, contents: bool) -> Checkpoint:
    """Return a checkpoint by its name or path, verified with or without the contents of its files."""
    for folder in (output_dir / named, named, output_dir / f".old-{named.name}"):
        if folder.is_dir():
            return Checkpoint(folder, verify_checkpoint(folder, contents=contents))
    raise CheckpointError(f'{named} is not a checkpoint in {output_dir}: give one that is there, or "latest"')


def _find_latest(output_dir: Path) -> Path | None:
    """Return the folder of the newest checkpoint that is whole, and log which are skipped; None where there is none."""
    found, damaged = _newest_whole(output_dir, contents=True)
    for skipped, problem in damaged:
        logger.warning("%s is skipped: %s", skipped.name, problem)
    if found is None:
        logger.warning("%s holds no checkpoint to resume from: the run begins from its start", output_dir)
        return None
    return found.folder


def _newest_whole(output_dir: Path, *, contents: bool) -> tuple[Checkpoint | None, list[tuple[Path, Exception]]]:
    """Return the newest checkpoint that is whole, and the damaged ones that are newer.

    Args:
        output_dir: folder of the run.
        contents: whether the contents of the files are compared; see `verify_checkpoint`.

    Returns:
        The checkpoint, None where the folder holds none at all; and folder and problem of each that is damaged.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[tuple[Path, Exception]] = []
    for _, folder in sorted(list_checkpoints(output_dir) + list_checkpoints(output_dir, ".old-"), reverse=True):
        try:
            return Checkpoint(folder, verify_checkpoint(folder, contents=contents)), damaged
        except (CheckpointError, OSError) as error:
            if not folder.name.startswith(".old-"):  # such a folder may be half deleted
                damaged.append((folder, error))
    if damaged:
        reasons = "; ".join(f"{each.name}: {_reason(each, problem)}" for each, problem in damaged)
        raise CheckpointError(
            f"every checkpoint in {printable(output_dir)} is damaged ({reasons}): restore one from a copy, or name a"
            " new output_dir"
        )
    return None, damaged


def _reason(folder: Path, error: Exception) -> str:
    """Return why a checkpoint is damaged, without its path and without the advice to take another one."""
    text = str(error).removesuffix(": resume from another checkpoint").removesuffix("; check the path")
    return text.replace(f"{folder}{os.sep}", "")


def _seal(folder: Path, step: int) -> None:
    """Bring every file below `folder` to disk, and write the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync_to_disk(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "step": step, "files": files})


def delete_old_checkpoints(output_dir: Path, step: int, keep: int | None) -> None:
    """Delete replaced and half-deleted checkpoints, and those before a step beyond the number that is kept.

    Args:
        output_dir: folder of the run.
        step: step of the newest checkpoint of the run.
        keep: number of checkpoints that stay, at least 1: that of `step` and those before it; None keeps all.
    """
    older = [folder for number, folder in list_checkpoints(output_dir) if number < step]
    try:
        for _, folder in list_checkpoints(output_dir, ".old-"):
            shutil.rmtree(folder)
        for folder in older[keep - 1 :] if keep is not None else ():
            # Renamed first, so that a folder that is half deleted no longer has the name of a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(f".old-{folder.name}")))
    except OSError as error:
        logger.warning("an old checkpoint could not be deleted: %s", error)
