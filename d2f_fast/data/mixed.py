"""Mix several data sets by weight behind one index. No torch is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from d2f_fast.data.captions import Captions
from d2f_fast.data.image_folder import CaptionedImages, Sample
from d2f_fast.data.order import Mixture
from d2f_fast.errors import RefusedInputError

Part = TypeVar("Part")


@runtime_checkable
class MixedDataset(Protocol):
    """Data set that may be mixed from several ones; its mixture is None where it is a single one."""

    mixture: Mixture | None


class MixedImages:
    """Read the captioned images of several folders, mixed by weight.

    Args:
        folders: The folders, two or more.
        weights: Weight of each folder; None for the numbers of their images. See `Mixture`.

    Attributes:
        folders: The folders.
        mixture: How they are mixed.

    Raises:
        RefusedInputError: The weights do not fit the folders.
    """

    def __init__(self, folders: Sequence[CaptionedImages], weights: Sequence[float] | None = None) -> None:
        self.folders = tuple(folders)
        self.mixture = mixture_of([len(folder) for folder in self.folders], weights)

    def __len__(self) -> int:
        return sum(map(len, self.folders))

    def __getitem__(self, index: int) -> Sample:
        folder, own_index = locate(self.folders, self.mixture, index)
        return folder[own_index]

    def path(self, index: int) -> Path:
        """Return the path of an image, without reading it."""
        folder, own_index = locate(self.folders, self.mixture, index)
        return folder.path(own_index)

    def captions(self, index: int) -> Captions:
        """Return the checked captions of an image, without reading the image."""
        folder, own_index = locate(self.folders, self.mixture, index)
        return folder.captions(own_index)


def mixture_of(sizes: Sequence[int], weights: Sequence[float] | None) -> Mixture | None:
    """Return how data sets are mixed; None for a single one.

    Args:
        sizes: Number of samples of each data set.
        weights: Weight of each data set; None for the numbers of samples, so that each sample comes once an epoch.

    Raises:
        RefusedInputError: The weights do not fit the data sets.
    """
    if weights is not None and (len(sizes) == 1 or len(weights) != len(sizes)):
        raise RefusedInputError(
            f"dataset_weights: {len(weights)} for {len(sizes)} data set{'' if len(sizes) == 1 else 's'}: give several"
            " folders after --train_data_dir, and one weight for each of them"
        )
    if len(sizes) == 1:
        return None
    try:
        return Mixture(tuple(sizes), tuple(map(float, weights or sizes)))
    except ValueError as error:
        raise RefusedInputError(f"dataset_weights: {error}: correct the weights") from error


def mixture_settings(mixture: Mixture | None) -> dict[str, str | float]:
    """Return what a continuation of a run must match of how its data sets are mixed.

    Args:
        mixture: How they are mixed; None for a single one.
    """
    if mixture is None:
        return {}
    by_size = mixture.weights == mixture.sizes
    weights = f"the sizes of {len(mixture.sizes)} data sets" if by_size else ", ".join(map(str, mixture.weights))
    return {"dataset_weights": weights}


def locate(parts: Sequence[Part], mixture: Mixture | None, index: int) -> tuple[Part, int]:
    """Return the data set that holds a sample, and the index of the sample in it.

    Args:
        parts: The data sets.
        mixture: How they are mixed; None for a single one. See `mixture_of`.
        index: Index of the sample among those of all data sets.
    """
    if mixture is None:
        return parts[0], index
    part, own_index = mixture.locate(index)
    return parts[part], own_index
