"""What a source of images with depth gives, and the checks that all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2f_fast.errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image


class DepthSample(NamedTuple):
    """One image with its depth.

    Attributes:
        image: Image of mode "RGB".
        depth: Depth in metres, [H, W]; what it holds where it is not valid has no meaning.
        valid: Which pixels have a depth, [H, W]; at least one has.
        name: Name of the image in messages.
    """

    image: "Image.Image"
    depth: NDArray[np.float32]
    valid: NDArray[np.bool_]
    name: str


class DepthSource(ABC):
    """Images with their depth, which are read when they are asked for. Any thread may read.

    Attributes:
        place: Folder of the images, for messages.
        layout: Name of the layout.
        scale: Number in the files that stands for one metre; None for files in metres.
        least: Smallest depth that counts, in metres.
        most: Largest depth that counts, in metres; infinite for none.
    """

    place: Path
    layout: str
    scale: float | None
    least: float
    most: float

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> DepthSample: ...

    @abstractmethod
    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        """Return a text that changes when the image or its depth changes.

        Args:
            index: Index of the image.
            hash_of_file: Function that returns the hash of a file.

        Raises:
            OSError: A file cannot be read.
        """


def check_sizes(image: "Image.Image", depth: NDArray[np.float32], name: str, depth_name: str) -> None:
    """Refuse an image and a depth map of different sizes.

    Args:
        image: The image.
        depth: Its depth, [H, W].
        name: Name of the image.
        depth_name: Name of the depth map.

    Raises:
        DatasetError: The sizes differ.
    """
    if depth.shape != (image.height, image.width):
        raise DatasetError(
            f"{name} has {image.width}x{image.height} pixels and {depth_name} {depth.shape[1]}x{depth.shape[0]}:"
            " give both in the same size"
        )


def check_units(
    depth: NDArray[np.float32], valid: NDArray[np.bool_], name: str, *, plausible: float, source: DepthSource
) -> None:
    """Refuse a depth map without a valid pixel, or with depths that no scene of its data set has.

    Args:
        depth: Depth in metres, [H, W].
        valid: Which pixels count, [H, W].
        name: Name of the depth map.
        plausible: Largest median depth of an image that can be right, in metres.
        source: Source of the depth, whose range the message states.

    Raises:
        DatasetError: No pixel counts, or half of them are farther away than is plausible.
    """
    positive = depth[np.isfinite(depth) & (depth > 0)]
    median = float(np.median(positive)) if positive.size else 0.0
    unit = "check its unit, which --depth_scale states, and --depth_min and --depth_max"
    if median > plausible:
        raise DatasetError(
            f"{name}: half of the pixels are beyond {median:.4g} m, and {plausible:g} m is the most that can be right:"
            f" {unit}"
        )
    if not valid.any():
        found = f"they are around {median:.4g} m" if positive.size else "none is finite and positive"
        raise DatasetError(
            f"{name}: no pixel has a depth between {source.least:g} and {source.most:g} m ({found}): {unit}, or remove"
            " the image"
        )
