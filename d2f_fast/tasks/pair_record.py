"""Write pairs.json, which says what pairs are made of and how, and refuse a folder of other pairs. Imports no torch."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.tasks.processes import Process

if TYPE_CHECKING:
    from d2f_fast.tasks.pairs import PairPlan

RECORD_FILE = "pairs.json"
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
        scheduler: Options of the sampling times.
    """
    return {
        "format": "d2f_fast.pairs.1",
        "num_pairs": plan.num_pairs,
        "pairs_per_shard": plan.pairs_per_shard,
        **prompt_entries(plan.prompts),
        "seed": plan.seed,
        "num_inference_steps": len(plan.times) - 1,
        "solver": plan.solver,
        **scheduler,
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

    Args:
        folder: Folder of the pairs, which this process has locked.
        record: Content of pairs.json.
        process: This process. The main one writes, and the others wait until it has.

    Raises:
        RefusedInputError: The folder holds pairs of other options, shards without pairs.json, or none appears.
    """
    path, wanted = folder / RECORD_FILE, json.loads(json.dumps(record))
    if process.is_main and not path.exists():
        if any(folder.glob("*.tar")):
            raise _shards_alone(folder)
        remove_unfinished(folder, RECORD_FILE)
        write_json(path, wanted)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
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
    path = folder / RECORD_FILE
    # The shards are looked for first, because another process may write pairs.json and then a shard meanwhile.
    has_shards = any(folder.glob("*.tar"))
    if path.exists():
        _refuse_changes(path, json.loads(json.dumps(known)))
    elif has_shards:
        raise _shards_alone(folder)


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what killed processes left when they wrote a file.

    Args:
        folder: Folder of the file.
        name: Name of the file.
    """
    for path in folder.glob(f".tmp-*-{name}"):
        path.unlink(missing_ok=True)


def _shards_alone(folder: Path) -> RefusedInputError:
    """Return the error of a folder that holds shards and no pairs.json."""
    return RefusedInputError(
        f"{printable(folder)} holds shards and no {RECORD_FILE}, which says how they were made: name a new output_dir"
    )


def _refuse_changes(path: Path, wanted: Mapping[str, object], *, of_all: bool = False) -> None:
    """Refuse a pairs.json that differs from the wanted entries, or also in further ones where all are wanted."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise RefusedInputError(f"{printable(path)} does not describe pairs: name a new output_dir")
    for key in {**wanted, **found} if of_all else wanted:
        if found.get(key) != wanted.get(key):
            raise RefusedInputError(
                f"{printable(path)}: {key} was {json.dumps(found.get(key))} and is now {json.dumps(wanted.get(key))}:"
                " give the same options as before to go on, or name a new output_dir"
            )
