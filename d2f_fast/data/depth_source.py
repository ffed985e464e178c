"""What a source of images with depth gives, and the checks that all of them share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class DepthLayout:
    """How a data set stores its images, and the units of its depth.

    Attributes:
        name: Name of the layout.
        scale: Number in the files that stands for one metre; None where the caller has to say it, or for metres.
        most: Largest depth that counts, in metres; infinite for no limit.
        plausible: Largest median depth of an image that can be right, in metres.
        least: Smallest depth that counts, in metres.
        nearest: Smallest median depth of an image that can be right, in metres; 0 for no limit.
        processing_resolution: Longer side in pixels at which the protocol of the data set predicts depth, 0 for the
            image's own size; None where there is no protocol.
        fit_side: Longer side in pixels above which the protocol fits the scale and the shift of a prediction on fewer
            pixels; None for all pixels.
    """

    name: str
    scale: float | None
    most: float
    plausible: float
    least: float = 0.0
    nearest: float = 0.0
    processing_resolution: int | None = None
    fit_side: int | None = None


class DepthSource(ABC):
    """Images with their depth, which are read when they are asked for. Any thread may read.

    Args:
        folder: Folder of the images.
        scale: Number in the files that stands for one metre; None for that of the layout.
        least: Smallest depth that counts, in metres, where it is above that of the layout.
        most: Largest depth that counts, in metres; None for that of the layout.

    Attributes:
        place: Folder of the images, for messages.
        layout: Name of the layout that was found.
        scale: Number in the files that stands for one metre; None for files in metres.
        least: Smallest depth that counts, in metres.
        most: Largest depth that counts, in metres; infinite for no limit.
        plausible: Largest median depth of an image that can be right, in metres.
        nearest: Smallest median depth of an image that can be right, in metres.
        processing_resolution: Longer side in pixels at which the protocol of the data set predicts depth; see
            `DepthLayout`.
        fit_side: Longer side in pixels above which the protocol fits fewer pixels; see `DepthLayout`.

    Raises:
        DatasetError: The folder cannot be used, or holds no images with depth. When a sample is read: a file does not
            decode, the sizes differ, no pixel has a depth, or the unit must be wrong.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        scale: float | None = None,
        least: float = 0.0,
        most: float | None = None,
    ) -> None:
        self.place = Path(folder)
        found = self._find()
        self.layout, self.plausible, self.nearest = found.name, found.plausible, found.nearest
        self.scale = found.scale if scale is None else scale
        self.least, self.most = max(least, found.least), found.most if most is None else most
        self.processing_resolution, self.fit_side = found.processing_resolution, found.fit_side

    @abstractmethod
    def _find(self) -> DepthLayout:
        """Find the images of `place`, keep what is needed to read them, and return their layout.

        Raises:
            DatasetError: The folder cannot be used, or holds no images with depth.
        """

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


def check_units(depth: NDArray[np.float32], valid: NDArray[np.bool_], name: str, source: DepthSource) -> None:
    """Refuse a depth map without a valid pixel, or with depths that no scene of its data set has.

    Args:
        depth: Depth in metres, [H, W].
        valid: Which pixels count, [H, W].
        name: Name of the depth map.
        source: Source of the depth, which says what is plausible and which range counts.

    Raises:
        DatasetError: No pixel counts, or half of them are farther away or nearer than is plausible.
    """
    positive = depth[np.isfinite(depth) & (depth > 0)]
    median = float(np.median(positive)) if positive.size else 0.0
    unit = "check its unit, which --depth_scale states, and --depth_min and --depth_max"
    if median > source.plausible:
        raise DatasetError(
            f"{name}: half of the pixels are beyond {median:.4g} m, and {source.plausible:g} m is the most that can be"
            f" right: {unit}"
        )
    if 0 < median < source.nearest:
        raise DatasetError(
            f"{name}: half of the pixels are nearer than {median:.4g} m, and {source.nearest:g} m is the least that can"
            f" be right: {unit}"
        )
    if not valid.any():
        found = f"they are around {median:.4g} m" if positive.size else "none is finite and positive"
        raise DatasetError(
            f"{name}: no pixel has a depth between {source.least:g} and {source.most:g} m ({found}): {unit}, or remove"
            " the image"
        )
