"""Captioned training images: the folder, the order, the augmentation, and who reads them.

    order(epoch)         = argsort(Philox(seed; epoch))
    draws(epoch, sample) = Philox(seed; epoch, sample)

What a global step sees is a pure function of (seed, step): a run that restarts at any step, with any number of
processes and of decoding threads, trains on the same images, mirrored, cropped and captioned the same way. Only raw
Philox words are used, whose stream numpy keeps from version to version.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.errors import DatasetError
from d2f_fast.data.image_folder import DECODING_ERRORS, MAX_IMAGE_PIXELS, CaptionedImages, printable, to_rgb, validated_text

__all__ = [
    "BatchPlan",
    "CaptionedImages",
    "Draws",
    "ImageDataset",
    "augmentation",
    "batch_indices",
    "check_dataset",
    "choose_caption",
    "iterate_indices",
    "load_ahead",
    "load_sample",
    "plan_batches",
    "preprocess",
    "steps_per_epoch",
]

Loaded = TypeVar("Loaded")

_ORDER_STREAM = 0
_AUGMENTATION_STREAM = 1


class ImageDataset(Protocol):
    """What a run trains on: items have "image" (PIL) and "text"; "path", where they have one, names them in errors."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


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


def preprocess(
    image: Image.Image, resolution: int, center_crop: bool, flip: bool, crop: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Resize the short side with Lanczos, crop a square, mirror it, and scale to [-1, 1]; as the diffusers scripts do.

    Equals `Normalize(0.5, 0.5)(ToTensor()(crop(Resize(resolution, LANCZOS)(image))))` of torchvision. An image that is
    `resolution` pixels square keeps its pixels: value / 127.5 - 1.

    Args:
        image: any mode, see `to_rgb`.
        resolution: side of the square, pixels.
        center_crop: crop the middle; otherwise `crop` says where.
        flip: mirror left and right, after the crop.
        crop: draws in [0, 1), (vertical, horizontal), of the position.

    Returns:
        [3, resolution, resolution], float32.

    Raises:
        ValueError: the resized image would have more than 2**27 pixels; or as `to_rgb`.
    """
    image = to_rgb(image)
    short = min(image.size)
    width, height = (resolution * side // short for side in image.size)
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels are too elongated for resolution {resolution}: crop the image"
        )
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    spare = (height - resolution, width - resolution)
    if center_crop:
        top, left = (round(pixels / 2) for pixels in spare)
    else:
        top, left = (int(draw * (pixels + 1)) for draw, pixels in zip(crop, spare, strict=True))
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return (pixels / 127.5 - 1).contiguous()


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


def choose_caption(text: str | list[str], draw: float) -> str:
    """Caption that a draw in [0, 1) picks among the alternatives."""
    return text if isinstance(text, str) else text[int(draw * len(text))]


def load_sample(
    dataset: ImageDataset, index: int, draws: Draws, resolution: int, *, random_flip: bool, center_crop: bool
) -> tuple[Tensor, str]:
    """Pixels, [3, resolution, resolution] float32 in [-1, 1], and caption of one sample, augmented by its draws.

    Raises:
        DatasetError: the sample has no image or no caption, or its image cannot be used.
    """
    sample = dataset[index]
    name = printable(sample["path"]) if "path" in sample else f"sample {index}"
    caption = choose_caption(validated_text(sample.get("text"), f'{name}: "text"'), draws.caption)
    if not isinstance(sample.get("image"), Image.Image):
        raise DatasetError(f'{name}: "image" must be a PIL image, got {type(sample.get("image")).__name__}')
    try:
        pixels = preprocess(sample["image"], resolution, center_crop, random_flip and draws.mirrored, draws.crop)
    except DECODING_ERRORS as error:
        raise DatasetError(f"{name}: {error}") from error
    return pixels, caption


def check_dataset(dataset: Any) -> None:
    """Refuse what has no order to be drawn in, or nothing.

    Raises:
        DatasetError: it has no length, no items by index, or none at all.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DatasetError(
            f"a dataset needs a length and items by index, and {type(dataset).__name__} has not: give a list, or a data"
            " set that is not iterable only"
        )
    if len(dataset) == 0:
        raise DatasetError("the dataset is empty: give at least one captioned image")


def load_ahead(
    plans: Iterator[BatchPlan], load: Callable[[BatchPlan], Loaded], workers: int
) -> Iterator[tuple[BatchPlan, Loaded]]:
    """Yield each plan with what `load` makes of it, in order.

    Args:
        plans: of this process.
        load: called from several threads at once where there is more than one.
        workers: threads that load while the caller computes, a batch each; 0 loads when asked.

    Raises:
        Exception: that of `load`, at the turn of its plan.
    """
    if workers == 0:
        for plan in plans:
            yield plan, load(plan)
        return
    pending: deque[tuple[BatchPlan, Future[Loaded]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for plan in plans:
            pending.append((plan, pool.submit(load, plan)))
            if len(pending) > workers:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        for oldest, future in pending:
            yield oldest, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
