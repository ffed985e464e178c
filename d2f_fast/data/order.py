"""Decide which samples each step trains on, in which order, and with which augmentation.

    order(epoch)                = argsort(Philox(seed; epoch))
    augmentation(epoch, sample) = Philox(seed; epoch, sample)

Of several data sets that are mixed by weight, each has its own passes, which take the place of the epochs in its
augmentations; see `Mixture`. Where their images have different sizes, each batch holds samples of one data set alone.

The content of a global step is a pure function of (seed, step): a run that restarts at any step, with any number of
processes and of decoding threads, trains on the same images, mirrored, cropped and captioned the same way. Only raw
Philox words are used, because numpy keeps their stream from version to version.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ORDER_STREAM = 0
_AUGMENTATION_STREAM = 1
_MIXTURE_STREAM = 2
_BATCH_STREAM = 3


class Augmentation(NamedTuple):
    """Random numbers in [0, 1) of one sample in one epoch.

    Attributes:
        flip: Below 0.5 the image is mirrored, where random flips are on.
        crop: Position of a random crop, (vertical, horizontal).
        caption: Number that selects one of the alternative captions.
    """

    flip: float
    crop: tuple[float, float]
    caption: float

    @property
    def mirrored(self) -> bool:
        """Return whether the image is mirrored, where random flips are on."""
        return self.flip < 0.5


@dataclass(frozen=True)
class Mixture:
    """Several data sets that are mixed by weight, behind one index: the samples of the first come first.

    An epoch has as many samples as all data sets together. The number of those of data set k is its share,

        weight_k / (weight_0 + weight_1 + …) · (size_0 + size_1 + …),

    rounded to whole numbers so that the sum is kept; it is the same in every epoch. Each data set is passed through in
    an order of its own, from one epoch into the next: no sample comes again before all others of its data set came.

    Where the data sets are kept apart, each batch holds samples of one of them. The batches of an epoch come in a
    random order; the last one of each data set is smaller where the batch size does not divide its number of samples.

    Args:
        sizes: Number of samples of each data set, at least 1.
        weights: Positive weight of each data set. Only their ratios count.
        apart: Whether the data sets are kept apart.

    Raises:
        ValueError: There are no data sets or not as many weights, one of them is out of its range, or a weight is so
            small that an epoch has no sample of its data set.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    apart: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be mixed."""
        if not self.sizes or len(self.sizes) != len(self.weights):
            raise ValueError(
                f"there must be one weight for each data set, got {len(self.weights)} for {len(self.sizes)}"
            )
        if min(self.sizes) < 1 or not all(0 < weight < np.inf for weight in self.weights):
            raise ValueError(f"sizes and weights must be positive and finite, got {self.sizes} and {self.weights}")
        if 0 in self.counts:
            part = self.counts.index(0)
            raise ValueError(f"the weight {self.weights[part]} leaves data set {part} without a sample in an epoch")

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Return the number of samples of each data set in an epoch."""
        return _rounded_shares(self.weights, sum(self.sizes))

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the data set of a sample, and the index of the sample in it.

        Args:
            index: Index of the sample, in [0, Σ sizes).
        """
        starts = [0, *accumulate(self.sizes)]
        part = bisect_right(starts, index) - 1
        return part, index - starts[part]

    def batches(self, batch_size: int) -> list[range]:
        """Return the positions in an epoch of the samples of each batch, where the data sets are kept apart.

        Args:
            batch_size: Number of samples in a batch, at least 1.
        """
        ends = list(accumulate(self.counts))
        return [
            range(first, min(first + batch_size, end))
            for end, count in zip(ends, self.counts, strict=True)
            for first in range(end - count, end, batch_size)
        ]

    def epoch(self, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the samples of an epoch, data set by data set, and the pass of its data set that each belongs to.

        Args:
            seed: Seed of the orders, in [0, 2**64).
            epoch: Number of the epoch, from 0 on.
        """
        samples, passes = [], []
        starts = [0, *accumulate(self.sizes[:-1])]
        for part, (start, size, count) in enumerate(zip(starts, self.sizes, self.counts, strict=True)):
            numbers = np.arange(epoch * count, (epoch + 1) * count)
            own = numbers // size
            orders = np.stack([_order(size, seed, _MIXTURE_STREAM, each, part) for each in range(own[0], own[-1] + 1)])
            samples.append(start + orders[own - own[0], numbers % size])
            passes.append(own)
        return np.concatenate(samples), np.concatenate(passes)


@dataclass(frozen=True)
class BatchPlan:
    """This process' slice of one global batch, before anything is decoded.

    Attributes:
        epoch: Number of the epoch, from 0 on.
        index: Indices of the samples in the data set.
        augmentations: Random numbers of each sample.
        global_batch_size: Number of samples in the global batch, over all processes.
        offset: Position in the global batch where this slice begins.
        part: Number of the data set of all samples of the global batch, where several are kept apart; else 0.
    """

    epoch: int
    index: list[int]
    augmentations: list[Augmentation]
    global_batch_size: int
    offset: int
    part: int = 0


def steps_per_epoch(length: int, batch_size: int, mixture: Mixture | None = None) -> int:
    """Return the number of global batches in an epoch.

    Args:
        length: Number of samples in the data set, at least 1.
        batch_size: Number of samples in a global batch, at least 1. The last batch of an epoch is smaller where it does
            not divide `length`.
        mixture: How several data sets are mixed; None for a single one.

    Raises:
        ValueError: `length` or `batch_size` is below 1.
    """
    if length < 1 or batch_size < 1:
        raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
    if mixture is not None and mixture.apart:
        return len(mixture.batches(batch_size))
    return -(-length // batch_size)


def iterate_indices(length: int, batch_size: int, seed: int, start_step: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Yield the epoch and the sample indices of every global batch, without end.

    Args:
        length: Number of samples in the data set.
        batch_size: Number of samples in a global batch.
        seed: Seed of the order, in [0, 2**64).
        start_step: Global step of the first batch that is yielded.

    Raises:
        ValueError: An argument is out of its range.
    """
    if start_step < 0:
        raise ValueError(f"start_step must be at least 0, got {start_step}")
    epoch, position = divmod(start_step, steps_per_epoch(length, batch_size))
    while True:
        order = _order(length, seed, _ORDER_STREAM, epoch)
        for first in range(position * batch_size, length, batch_size):
            yield epoch, order[first : first + batch_size].tolist()
        epoch, position = epoch + 1, 0


def batch_indices(length: int, batch_size: int, seed: int, step: int) -> tuple[int, list[int]]:
    """Return the epoch and the sample indices of the global batch of one step.

    An epoch is a permutation of all samples that depends on `seed` and the epoch alone. Its last batch is kept, however
    small, and no sample is repeated to fill it.

    Args:
        length: Number of samples in the data set.
        batch_size: Number of samples in a global batch.
        seed: Seed of the order, in [0, 2**64).
        step: Global step, from 0 on.

    Raises:
        ValueError: An argument is out of its range.
    """
    return next(iterate_indices(length, batch_size, seed, step))


def sample_augmentation(seed: int, epoch: int, index: int) -> Augmentation:
    """Return the random numbers of one sample in one epoch, each with 53 random bits.

    Args:
        seed: Seed of the run, in [0, 2**64).
        epoch: Number of the epoch, from 0 on.
        index: Index of the sample in the data set.
    """
    words = _philox(seed, _AUGMENTATION_STREAM, epoch, index).random_raw(4)
    flip, vertical, horizontal, caption = ((words >> np.uint64(11)) * 2.0**-53).tolist()
    return Augmentation(flip, (vertical, horizontal), caption)


def plan_batches(
    length: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    mixture: Mixture | None = None,
) -> Iterator[BatchPlan]:
    """Yield this process' slice of every global batch, without end and without reading an image.

    The slices of all ranks, in order, are the global batch; their sizes differ by one at most. A slice is empty only
    where the global batch is smaller than `world_size`, as the last one of an epoch may be.

    Args:
        length: Number of samples in the data set.
        batch_size: Number of samples in a global batch.
        seed: Seed of order and augmentation, in [0, 2**64).
        start_step: Global step of the first plan.
        rank: Number of this process, in [0, world_size).
        world_size: Number of processes.
        mixture: How several data sets are mixed, with `length` samples together; None for a single one.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
    if mixture is not None and sum(mixture.sizes) != length:
        raise ValueError(f"the mixture must have {length} samples, got {sum(mixture.sizes)}")
    mixed_epoch, samples, passes = -1, np.empty(0, np.int64), np.empty(0, np.int64)
    if mixture is not None and mixture.apart:
        positions = _iterate_apart(mixture, batch_size, seed, start_step)
    else:
        positions = iterate_indices(length, batch_size, seed, start_step)
    for epoch, indices in positions:
        size, larger_slices = divmod(len(indices), world_size)
        offset = rank * size + min(rank, larger_slices)
        mine = indices[offset : offset + size + (rank < larger_slices)]
        times, part = [epoch] * len(mine), 0
        if mixture is not None:
            if epoch != mixed_epoch:
                mixed_epoch, (samples, passes) = epoch, mixture.epoch(seed, epoch)
            part = mixture.locate(int(samples[indices[0]]))[0] if mixture.apart else 0
            mine, times = samples[mine].tolist(), passes[mine].tolist()
        augmentations = [sample_augmentation(seed, time, index) for time, index in zip(times, mine, strict=True)]
        yield BatchPlan(epoch, mine, augmentations, len(indices), offset, part)


def _iterate_apart(mixture: Mixture, batch_size: int, seed: int, start_step: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the epoch and the positions in it of the samples of every global batch, each of one data set alone."""
    if start_step < 0:
        raise ValueError(f"start_step must be at least 0, got {start_step}")
    batches = mixture.batches(batch_size)
    epoch, position = divmod(start_step, len(batches))
    while True:
        for number in _order(len(batches), seed, _BATCH_STREAM, epoch)[position:].tolist():
            yield epoch, list(batches[number])
        epoch, position = epoch + 1, 0


def _rounded_shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Return whole numbers in the ratio of weights whose sum is `total`, by the method of largest remainders."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    return tuple(counts)


def _order(length: int, seed: int, stream: int, epoch: int, part: int = 0) -> NDArray[np.int64]:
    """Return a random permutation of 0 … length - 1."""
    return np.argsort(_philox(seed, stream, epoch, part).random_raw(length), kind="stable")


def _philox(seed: int, stream: int, epoch: int, index: int = 0) -> np.random.Philox:
    """Return a counter-based generator that is independent for each set of arguments."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, index, epoch, 0], dtype=np.uint64))
