"""Fill a folder with shards of pairs, by one process or several, and go on after any kill.

    pairs.json      what the pairs are made of and how; a run with other options is refused
    000000.tar …    the shards; process r of n makes those whose number is r modulo n
    grid.png        the first pairs: their images and prompts

A shard that has its name is whole and is never written again. Nothing in the folder depends on the number of processes
or on the time, so that two folders of the same options, made on the same kind of machine, are equal byte for byte.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from d2f_fast.data.pair_shards import PairRecord, pair_bytes, read_shard, shard_name, write_shard
from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.files.atomic import in_mebibytes
from d2f_fast.files.tar_index import BLOCK
from d2f_fast.tasks.pair_grid import GRID_FILE, write_grid
from d2f_fast.tasks.pair_record import remove_unfinished
from d2f_fast.tasks.pairs import PairGenerator, PairPlan
from d2f_fast.tasks.processes import Process

# JPEG images of this quality have about half a byte for each pixel, and at most about this many.
_IMAGE_BYTES_PER_PIXEL = 0.7


class PairFolder:
    """The shards of a plan in a folder, those that exist and those that are still to be made.

    Args:
        folder: Folder of the pairs, which this process has locked.
        plan: What is made, and how.
        process: This process.
        origin: Entries about the model in the meta.json of each pair.

    Raises:
        RefusedInputError: A finished shard has been damaged, or holds other pairs.
    """

    def __init__(self, folder: Path, plan: PairPlan, process: Process, origin: Mapping[str, object]) -> None:
        self.folder, self.plan, self.process = folder, plan, process
        numbers = range(plan.num_shards)
        self.missing = [number for number in numbers if not self.path(number).exists()]
        missing = set(self.missing)
        for number in filter(process.owns, numbers):
            if number in missing:
                continue
            self._check_finished(number, origin)
        for path in folder.glob(".tmp-*.tar"):
            # Another process may be writing the shard that it owns.
            if process.owns(_number_of(path)):
                path.unlink(missing_ok=True)
        if process.is_main:
            remove_unfinished(folder, GRID_FILE)
            if 0 in missing:  # The grid shows the first shard.
                (folder / GRID_FILE).unlink(missing_ok=True)

    def path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.folder / shard_name(number)

    def _check_finished(self, number: int, origin: Mapping[str, object]) -> None:
        """Refuse a finished shard that does not hold its pairs.

        Raises:
            RefusedInputError: It cannot be read, or has other pairs.
        """
        path, pairs = self.path(number), self.plan.shard(number)
        try:
            shard = read_shard(path)
            meta = json.loads(json.dumps({**self.plan.meta(pairs.start), **origin}))
            whole = len(shard) == len(pairs) and shard.meta == meta and len(shard.kinds) == 1
        except DatasetError:
            whole = False
        if not whole:
            raise RefusedInputError(
                f"{printable(path)} is damaged, or holds other pairs: remove it, and run again to make it anew"
            )

    def check_disk(self, shape: tuple[int, ...]) -> str:
        """Return a line about the space that the missing shards need, or refuse a disk that lacks it.

        Args:
            shape: Shape of the latents, [C, h, w].

        Raises:
            RefusedInputError: The disk has less free space than the shards need.
        """
        plan = self.plan
        item = 2 if plan.dtype == "float16" else 4
        image = int(plan.height * plan.width * _IMAGE_BYTES_PER_PIXEL) if plan.save_images else 0
        pairs = (i for number in self.missing for i in plan.shard(number))
        needed = sum(pair_bytes(shape, item, len(plan.prompt(i).encode()), image) for i in pairs)
        needed += len(self.missing) * 20 * BLOCK  # A tar is filled up to a whole record.
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            smaller = "" if plan.dtype == "float16" else ", --dtype float16"
            # The options of a folder that has shards cannot change.
            fewer = f"fewer --num_pairs{smaller} or " if len(self.missing) == plan.num_shards else ""
            raise RefusedInputError(
                f"{printable(self.folder)}: {in_mebibytes(needed)} are needed, and {in_mebibytes(free)} are free: make"
                f" room, or give {fewer}another output_dir"
            )
        return f"{in_mebibytes(needed)} of disk needed, {in_mebibytes(free)} free"

    def fill(self, shard: Callable[[int], Iterator[PairRecord]]) -> int:
        """Make the missing shards of this process, with a progress bar, and return the number of pairs made.

        Args:
            shard: Function that generates the pairs of a shard.

        Raises:
            DatasetError: A pair is not finite, or the noise of a shard is not normal; no such shard is kept.
            RefusedInputError: The disk is full.
        """
        mine = [number for number in range(self.plan.num_shards) if self.process.owns(number)]
        missing = set(self.missing)
        left = [number for number in mine if number in missing]
        total = sum(len(self.plan.shard(number)) for number in mine)
        made = sum(len(self.plan.shard(number)) for number in left)
        where = f" of process 0 of {self.process.count}" if self.process.count > 1 else ""
        finished = 0
        try:
            with tqdm(
                total=total,
                initial=total - made,
                desc=f"d2f pairs{where}",
                unit="image",
                dynamic_ncols=True,
                disable=not self.process.is_main,
            ) as bar:
                for number in left:
                    write_shard(self.path(number), _counted(shard(number), bar), len(self.plan.shard(number)))
                    finished += 1
        except KeyboardInterrupt:  # SIGTERM, too
            done = len(mine) - len(left) + finished
            print(
                f"d2f: {done} of {len(mine)} shards{where} are finished: the same command makes the others",
                file=sys.stderr,
            )
            raise
        return made

    def write_grid(self, generator: PairGenerator) -> Path | None:
        """Write the grid of the first pairs if it is missing, and return its path; None in another process."""
        if not self.process.is_main:
            return None
        path = self.folder / GRID_FILE
        if not path.exists():
            write_grid(path, self.path(0), generator.decode)
        return path


def _counted(pairs: Iterator[PairRecord], bar: "tqdm[object]") -> Iterator[PairRecord]:
    """Yield pairs, and count them on a progress bar."""
    for pair in pairs:
        yield pair
        bar.update()


def _number_of(path: Path) -> int:
    """Return the number of the shard that a temporary file was to become; -1 for another file."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
