"""Sizes of training images, as the option `resolution` states them: one size, or one for each of several data sets.

A resolution is one number, the side of squares; or a height and a width; or a height and a width for each data set, one
after the other. This module imports no torch.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from d2f_fast.errors import RefusedInputError

LARGEST_SIDE = 1 << 14  # Larger ones are typing errors.
_PIPELINE_FACTOR = 8  # diffusers' pipelines refuse every height and width that is not a multiple of it.
Resolution: TypeAlias = tuple[int, ...] | int
_SIZE_IN_TEXT = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


class Size(NamedTuple):
    """Size of an image.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
    """

    height: int
    width: int

    def __str__(self) -> str:
        """Return the size as messages show it, height first."""
        return f"{self.height} x {self.width}"


def side_multiple(downsampling: int) -> int:
    """Return the number of pixels of which the height and the width of generated images must be multiples.

    Args:
        downsampling: Number of pixels along each side of one latent.
    """
    return math.lcm(_PIPELINE_FACTOR, downsampling)


def check_resolution(name: str, value: Sequence[int] | int | None, least: int, most: int) -> None:
    """Refuse a resolution that does not state a size; None is accepted.

    Args:
        name: Name of the option.
        value: Its value.
        least: Smallest side in pixels.
        most: Largest side in pixels.

    Raises:
        RefusedInputError: A side is out of its range, or a height has no width.
    """
    if value is None:
        return
    numbers = value if isinstance(value, Sequence) else [value]
    for number in numbers:
        if number < least:
            raise RefusedInputError(f"{name} must be at least {least}, got {number}")
        if number > most:
            raise RefusedInputError(f"{name} must be at most {most:,}, got {number}")
    if not numbers or (len(numbers) > 1 and len(numbers) % 2):
        raise RefusedInputError(
            f"{name} must be one number for squares, or pairs of a height and a width, got {len(numbers)} numbers"
        )


def check_data_sets(resolution: Resolution | None, data_sets: int) -> None:
    """Refuse a resolution that does not say clearly which size each data set has; None is accepted.

    Args:
        resolution: Resolution of a run.
        data_sets: Number of its data sets.

    Raises:
        RefusedInputError: It has neither one number nor a height and a width for each data set.
    """
    if isinstance(resolution, tuple) and len(resolution) != 2 * data_sets:
        several = f"or {2 * data_sets} numbers, the height and the width of each"
        cure = "for a square, or its height and its width" if data_sets == 1 else f"for squares of one size, {several}"
        raise RefusedInputError(
            f"resolution: {len(resolution)} numbers for {data_sets} data set{'s' * (data_sets > 1)}: give one number"
            f" {cure}"
        )


def simplest(resolution: Sequence[int] | int | None) -> Resolution | None:
    """Return a resolution as one number where all of its sides are equal, and else as a tuple; None stays None."""
    if resolution is None or isinstance(resolution, int):
        return resolution
    return resolution[0] if len(set(resolution)) == 1 else tuple(resolution)


def sizes_of(resolution: Resolution) -> tuple[Size, ...]:
    """Return the sizes that a resolution states: one, or one for each data set.

    Args:
        resolution: Resolution that `check_resolution` accepts.
    """
    if isinstance(resolution, int):
        return (Size(resolution, resolution),)
    return tuple(map(Size, resolution[::2], resolution[1::2]))


def sizes_differ(resolution: Resolution) -> bool:
    """Return whether data sets have different sizes, so that a batch must hold samples of one of them alone."""
    return len(set(sizes_of(resolution))) > 1


def size_text(resolution: Resolution) -> str:
    """Return a resolution as the header of a file states it: "64", "48x64" (height x width), or "48x64 64x64"."""
    if isinstance(resolution, int):
        return str(resolution)
    return " ".join(f"{size.height}x{size.width}" for size in sizes_of(resolution))


def first_size(text: str) -> Size:
    """Return the first size of a text that `size_text` made.

    Args:
        text: The text.

    Raises:
        ValueError: It does not state a size.
    """
    found = _SIZE_IN_TEXT.fullmatch(text.partition(" ")[0])
    if found is None or not all(0 < int(side) <= LARGEST_SIDE for side in found.groups(default="1")):
        raise ValueError(f"must be a size in pixels, such as 64 or 48x64 (height x width), got {text[:100]}")
    return Size(int(found[1]), int(found[2] or found[1]))
