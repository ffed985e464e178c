"""Write pairs.json, which says what pairs are made of and how, and refuse a folder of other pairs. Imports no torch."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_fast.data.file_names import PAIRS_FILE
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.tasks.processes import Process

if TYPE_CHECKING:
    from d2f_fast.tasks.pairs import PairPlan

FORMAT = "d2f_fast.pairs.1"
# Entries of a scheduler's configuration on which the path from noise to image depends.
_OF_SCHEDULER = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "fm_form", "flow_spacing", "shift"),
)
_MAX_SHOWN = 80  # characters of an entry in a message
# Process 0 writes pairs.json, after it has loaded the model; the others wait for it.
_PATIENCE_SECONDS = 1800.0


def prompt_entries(prompts: Sequence[str]) -> dict[str, object]:
    """Return the entries of pairs.json about the prompts.

    Args:
        prompts: The prompts, in their order.
    """
    return {"prompts": len(prompts), "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}


def pair_record(plan: "PairPlan", origin: Mapping[str, object], scheduler: Mapping[str, object]) -> dict[str, object]:
    """Return the content of pairs.json: everything that the pairs depend on.

    Args:
        plan: What is made, and how.
        origin: Entries about the model and its LoRA.
        scheduler: Configuration of the `Diff2FlowScheduler` along whose flow they are made.
    """
    return {
        "format": FORMAT,
        "num_pairs": plan.num_pairs,
        "pairs_per_shard": plan.pairs_per_shard,
        **prompt_entries(plan.prompts),
        "seed": plan.seed,
        "num_inference_steps": len(plan.times) - 1,
        "solver": plan.solver,
        **{name: scheduler[name] for name in _OF_SCHEDULER},
        "guidance_scale": plan.guidance_scale,
        "guidance_scale_max": plan.guidance_scale_max,
        "negative_prompt": plan.negative_prompt,
        "height": plan.height,
        "width": plan.width,
        "dtype": plan.dtype,
        "mixed_precision": plan.precision,
        "batch_size": plan.batch_size,
        "save_images": plan.save_images,
        **origin,
    }


def settle_record(folder: Path, record: Mapping[str, object], process: Process) -> None:
    """Write pairs.json, or refuse a folder whose pairs were made with other options.

    A pairs.json beside which no shard is finished describes nothing, and is replaced.

    Args:
        folder: Folder of the pairs, which this process has locked.
        record: Content of pairs.json.
        process: This process. The main one writes, and the others wait until it has.

    Raises:
        RefusedInputError: The folder holds pairs of other options, shards without pairs.json, or none appears.
    """
    path, wanted = folder / PAIRS_FILE, json.loads(json.dumps(record))
    if process.is_main and not path.exists() and _has_shards(folder):
        raise _shards_alone(folder)
    if process.is_main and _is_replaced(path, wanted):
        remove_unfinished(folder, PAIRS_FILE)
        write_json(path, wanted)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while _is_replaced(path, wanted):
        if time.monotonic() > deadline:
            raise RefusedInputError(f"process 0 has not written {printable(path)}: start all processes together")
        time.sleep(0.1)
    _refuse_changes(path, wanted, of_all=True)


def check_record(folder: Path, known: Mapping[str, object]) -> None:
    """Refuse a folder whose pairs were made with other options, as far as this is known before the model is loaded.

    Args:
        folder: Folder of the pairs; it need not exist.
        known: Entries of pairs.json that the options alone settle.

    Raises:
        RefusedInputError: The folder holds pairs of other options, or shards without pairs.json.
    """
    path = folder / PAIRS_FILE
    # The shards are looked for first, because another process may write pairs.json and then a shard meanwhile.
    has_shards = _has_shards(folder)
    if not path.exists():
        if has_shards:
            raise _shards_alone(folder)
    elif has_shards or not _is_of_pairs(_read(path)):
        _refuse_changes(path, json.loads(json.dumps(known)))


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what killed processes left when they wrote a file.

    Args:
        folder: Folder of the file.
        name: Name of the file.
    """
    for path in folder.glob(f".tmp-*-{name}"):
        path.unlink(missing_ok=True)


def _has_shards(folder: Path) -> bool:
    """Return whether a folder holds a finished shard."""
    return any(not path.name.startswith(".") for path in folder.glob("*.tar"))


def _read(path: Path) -> object:
    """Return the content of a pairs.json.

    Raises:
        RefusedInputError: It cannot be read.
    """
    try:
        return read_json(path)
    except RefusedInputError as error:
        raise RefusedInputError(
            f"{printable(path)} is damaged: name a new output_dir, or remove the file if no shard is finished"
        ) from error


def _is_of_pairs(found: object) -> bool:
    """Return whether the content of a pairs.json is that of one of this package."""
    return isinstance(found, dict) and found.get("format") == FORMAT


def _is_replaced(path: Path, wanted: Mapping[str, object]) -> bool:
    """Return whether process 0 writes pairs.json: there is none, or one of other options before any shard of them."""
    if not path.exists():
        return True
    found = _read(path)
    # The shards are looked for last: process 0 finishes the first one after it has written pairs.json.
    return _is_of_pairs(found) and found != wanted and not _has_shards(path.parent)


def _shards_alone(folder: Path) -> RefusedInputError:
    """Return the error of a folder that holds shards and no pairs.json."""
    return RefusedInputError(
        f"{printable(folder)} holds shards and no {PAIRS_FILE}, which says how they were made: name a new output_dir"
    )


def _refuse_changes(path: Path, wanted: Mapping[str, object], *, of_all: bool = False) -> None:
    """Refuse a pairs.json that differs from the wanted entries, or also in further ones where all are wanted."""
    found = _read(path)
    if not isinstance(found, dict):
        raise RefusedInputError(f"{printable(path)} does not describe pairs: name a new output_dir")
    for key in {**wanted, **found} if of_all else wanted:
        if found.get(key) != wanted.get(key):
            raise RefusedInputError(
                f"{printable(path)}: {key} was {_shown(found.get(key))} and is now {_shown(wanted.get(key))}: give the"
                " same options and the same model as before to go on, or name a new output_dir"
            )


def _shown(value: object) -> str:
    """Return an entry of pairs.json for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} …"
