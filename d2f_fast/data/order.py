"""Captioned training images: the folder, the order, the augmentation, and who reads them.

    order(epoch)         = argsort(Philox(seed; epoch))
    draws(epoch, sample) = Philox(seed; epoch, sample)

What a global step sees is a pure function of (seed, step): a run that restarts at any step, with any number of
processes and of decoding threads, trains on the same images, mirrored, cropped and captioned the same way. Only raw
Philox words are used, whose stream numpy keeps from version to version.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_ORDER_STREAM = 0
_AUGMENTATION_STREAM = 1


class Draws(NamedTuple):
    """Uniform draws in [0, 1) of one sample in one epoch; `crop` is (vertical, horizontal)."""

    flip: float
    crop: tuple[float, float]
    caption: float

    @property
    def mirrored(self) -> bool:
        """Whether the sample is mirrored, where random flips are on."""
        return self.flip < 0.5


@dataclass(frozen=True)
class BatchPlan:
    """One process' share of a global batch, before anything is decoded."""

    epoch: int
    index: list[int]
    draws: list[Draws]
    global_batch_size: int
    offset: int


def _philox(seed: int, stream: int, epoch: int, index: int = 0) -> np.random.Philox:
    """Counter-based generator, one independent stream for each set of arguments."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, index, epoch, 0], dtype=np.uint64))


def steps_per_epoch(length: int, batch_size: int) -> int:
    """Global batches in an epoch; the last one is smaller when `batch_size` does not divide `length`."""
    if length < 1 or batch_size < 1:
        raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
    return -(-length // batch_size)


def iterate_indices(length: int, batch_size: int, seed: int, start_step: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Yield `batch_indices` of `start_step` and every later step, without end; one permutation an epoch."""
    if start_step < 0:
        raise ValueError(f"start_step must be at least 0, got {start_step}")
    epoch, position = divmod(start_step, steps_per_epoch(length, batch_size))
    while True:
        order = np.argsort(_philox(seed, _ORDER_STREAM, epoch).random_raw(length), kind="stable")
        for first in range(position * batch_size, length, batch_size):
            yield epoch, order[first : first + batch_size].tolist()
        epoch, position = epoch + 1, 0


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> tuple[int, list[int]]:
    """Epoch and sample indices of the global batch of a global step.

    An epoch is a permutation of all samples that depends on `seed` and the epoch alone; its last batch is kept, however
    small, and nothing is repeated to fill it.
    """
    return next(iterate_indices(length, batch_size, seed, step))


def augmentation(seed: int, epoch: int, index: int) -> Draws:
    """Uniform draws for the flip, the crop and the caption of one sample in one epoch, in [0, 1) with 53 bits."""
    words = _philox(seed, _AUGMENTATION_STREAM, epoch, index).random_raw(4)
    flip, vertical, horizontal, caption = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return Draws(flip, (vertical, horizontal), caption)


def plan_batches(
    length: int, batch_size: int, seed: int, start_step: int = 0, *, rank: int = 0, world_size: int = 1
) -> Iterator[BatchPlan]:
    """Yield what this process trains on at each global step, without end and without reading an image.

    The shares of all ranks, in order, are the global batch; their sizes differ by one at most. A share is empty only
    where the global batch is smaller than `world_size`, as the last one of an epoch may be.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
    for epoch, indices in iterate_indices(length, batch_size, seed, start_step):
        share, larger_shares = divmod(len(indices), world_size)
        offset = rank * share + min(rank, larger_shares)
        mine = indices[offset : offset + share + (rank < larger_shares)]
        yield BatchPlan(epoch, mine, [augmentation(seed, epoch, index) for index in mine], len(indices), offset)
