"""Divide the work of a task among processes that need not talk to each other. Torch is not imported here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d2f_fast.errors import RefusedInputError
from d2f_fast.files.lock import LOCK_FILE, locked_folder, locked_place

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Process:
    """One of the processes that fill a folder.

    Args:
        rank: Its number, from 0 on.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> "Process":
        """Return this process as `accelerate launch` or `torchrun` started it; alone where neither did."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def is_main(self) -> bool:
        """Return whether this process writes what belongs to all of them."""
        return self.rank == 0

    def owns(self, shard: int) -> bool:
        """Return whether this process makes a shard."""
        return shard % self.count == self.rank


@contextmanager
def owned_folder(folder: Path, process: Process) -> Iterator[None]:
    """Keep other runs out of a folder inside a `with` block; each process of a run has a lock of its own.

    Args:
        folder: Folder of the pairs, which is made where it is missing.
        process: This process.

    Raises:
        RefusedInputError: Another run fills the folder, or it cannot be written.
    """
    with locked_folder(folder) if process.is_main else locked_place(folder / f"process-{process.rank}"):
        if process.is_main:
            # Locks of killed processes, of which this run has no successor, who would remove them.
            for path in folder.glob(f"{LOCK_FILE}-process-*"):
                name = path.name.removeprefix(f"{LOCK_FILE}-")
                if int(name.removeprefix("process-")) >= process.count:
                    with suppress(RefusedInputError), locked_place(folder / name):
                        pass
        yield


def device_of(process_number: int) -> "torch.device":
    """Return the device of a process: a GPU by its number on this machine, or the CPU.

    Args:
        process_number: Number of the process on this machine.
    """
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", process_number % torch.cuda.device_count())
