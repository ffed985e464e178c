"""Read the samples of a data set, and load the batches ahead of the step that trains on them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from PIL import Image
from torch import Tensor

from d2f_fast.data.captions import Captions
from d2f_fast.data.image_headers import reason_of
from d2f_fast.data.images import preprocess, to_rgb
from d2f_fast.data.order import Augmentation, BatchPlan
from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.image_sizes import Size

Loaded = TypeVar("Loaded")


class ImageDataset(Protocol):
    """Data set of captioned images: it has a length, and a sample for each index from 0 on.

    A sample is a mapping with the keys "image", a PIL image of any mode, and "text", a caption or a list of
    alternatives, of which each epoch uses one. A third key, "path", is optional; it names the sample in errors. An
    index must always give the same sample.

    Where latents are cached, each sample is read once in a run to find its cache entry, unless the data set has these
    optional methods:

    - `key(index) -> str` identifies the image (`KeyedDataset`), or `path(index) -> Path` gives its file
      (`FileDataset`);
    - `captions(index) -> Captions` returns its checked captions (`CaptionedDataset`).
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


@runtime_checkable
class KeyedDataset(Protocol):
    """Data set that identifies an image without reading it."""

    def key(self, index: int, /) -> str:
        """Return any string that changes when the image of the sample changes.

        Two images that share a cache folder must not have the same key, even if they are of different data sets: use
        a content hash, or a name that includes the data set's name and version.
        """
        ...


@runtime_checkable
class FileDataset(Protocol):
    """Data set whose images are files. The cache identifies an image by the content of its file."""

    def path(self, index: int, /) -> Path:
        """Return the path of the image file of a sample."""
        ...


@runtime_checkable
class CaptionedDataset(Protocol):
    """Data set that returns captions without reading the image."""

    def captions(self, index: int, /) -> Captions:
        """Return the checked captions of a sample."""
        ...


class ReadSample(NamedTuple):
    """One sample, read and checked.

    Attributes:
        image: Upright image of mode "RGB".
        captions: Its checked captions.
        name: Name of the sample in errors.
    """

    image: Image.Image
    captions: Captions
    name: str


def read_sample(dataset: ImageDataset, index: int) -> ReadSample:
    """Read one sample: check its captions, and convert its image to RGB.

    No other place converts an image or checks the captions of a sample.

    Args:
        dataset: Data set of captioned images.
        index: Index of the sample.

    Raises:
        DatasetError: The data set raises an exception for this sample, the sample has no image or no caption, or its
            image cannot be used.
    """
    with refused_sample(f"sample {index}"):
        sample = dataset[index]
        name = printable(sample["path"]) if "path" in sample else f"sample {index}"
    if isinstance(dataset, CaptionedDataset):
        captions = dataset.captions(index)
    else:
        captions = Captions.check(sample.get("text"), f'{name}: "text"')
    image = sample.get("image")
    if not isinstance(image, Image.Image):
        raise DatasetError(f'{name}: "image" must be a PIL image, got {type(image).__name__}')
    with refused_sample(name):
        return ReadSample(to_rgb(image), captions, name)


def augmented_pixels(
    sample: ReadSample, augmentation: Augmentation, size: int | Size, *, random_flip: bool, center_crop: bool
) -> Tensor:
    """Return the training pixels of a sample, cropped and mirrored as its augmentation says.

    Args:
        sample: The sample.
        augmentation: Random numbers of the sample in this epoch.
        size: Size to which the image is resized and cropped; one number is the side of a square.
        random_flip: Whether the augmentation may mirror the image.
        center_crop: Whether the middle is cropped. Otherwise the augmentation gives the position.

    Returns:
        Pixels, [3, height, width], float32, in [-1, 1].

    Raises:
        DatasetError: The image is too elongated for the size.
    """
    flip = random_flip and augmentation.mirrored
    with refused_sample(sample.name):
        return preprocess(sample.image, size, center_crop, flip, augmentation.crop)


@contextmanager
def refused_sample(name: str) -> Iterator[None]:
    """Turn every exception inside a `with` block into a DatasetError that names the sample; refusals stay as they are.

    Data sets read their files lazily, and the decoders of images raise exceptions of any type. A run that meets one
    is saved and stopped, as for any other sample that cannot be used.

    Args:
        name: Name of the sample in the message.

    Raises:
        DatasetError: The block raised an exception; it is the cause of this one.
    """
    try:
        yield
    except RefusedInputError:
        raise
    except ValueError as error:  # Those of this package say what to do.
        raise DatasetError(f"{name}: {reason_of(error)}") from error
    except Exception as error:
        kind = type(error).__name__
        raise DatasetError(f"{name} cannot be used ({kind}: {reason_of(error)}): replace it") from error


def check_dataset(dataset: object) -> None:
    """Refuse a data set that cannot be trained on.

    Args:
        dataset: What the caller gave as the data set.

    Raises:
        DatasetError: It has no length, no samples by index, or no sample at all, or is a dictionary of data sets.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DatasetError(
            f"a dataset needs a length and items by index, and {type(dataset).__name__} has not: give a list, or a data"
            " set that is not iterable only"
        )
    if len(dataset) == 0:
        raise DatasetError("the dataset is empty: give at least one captioned image")
    if isinstance(dataset, Mapping) and 0 not in dataset:  # `datasets.DatasetDict` is one.
        first = next(iter(dataset))
        raise DatasetError(f"the dataset is a dictionary of splits: give one of them, such as dataset[{first!r}]")


def load_ahead(
    plans: Iterator[BatchPlan], load: Callable[[BatchPlan], Loaded], workers: int
) -> Iterator[tuple[BatchPlan, Loaded]]:
    """Yield each plan with the result of `load` for it, in order.

    Args:
        plans: Plans of this process.
        load: Function that loads one batch. Several threads call it at once where `workers` is 2 or more.
        workers: Number of threads that load while the caller computes, one batch each. 0 loads in the calling thread,
            when a batch is asked for.

    Raises:
        Exception: `load` raised it; it is raised again when its batch is due.
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
