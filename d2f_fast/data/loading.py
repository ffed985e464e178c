"""Load the samples of a batch, ahead of the step that trains on them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from PIL import Image
from torch import Tensor

from d2f_fast.data.captions import choose_caption, validated_text
from d2f_fast.data.images import DECODING_ERRORS, preprocess
from d2f_fast.data.order import BatchPlan, Draws
from d2f_fast.errors import DatasetError, printable

Loaded = TypeVar("Loaded")


class ImageDataset(Protocol):
    """What a run trains on: items have "image" (PIL) and "text"; "path", where they have one, names them in errors."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


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
