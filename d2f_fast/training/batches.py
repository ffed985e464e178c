"""Make the batches of a run: plan them, load them ahead of the step, and encode what the cache lacks."""

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Protocol, TypeAlias, TypeVar

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.depth_encoding import DepthDataset, DepthEncoder
from d2f_fast.data.encoding import BatchEncoder
from d2f_fast.data.loading import ImageDataset, load_ahead
from d2f_fast.data.order import BatchPlan, plan_batches
from d2f_fast.data.pair_encoding import PairEncoder
from d2f_fast.data.pairs import PairDataset
from d2f_fast.models.base_model import BaseModel

Loaded = TypeVar("Loaded")
TrainingData: TypeAlias = ImageDataset | PairDataset | DepthDataset


class Processes(Protocol):
    """Describe what is used of accelerate's Accelerator."""

    num_processes: int

    @property
    def process_index(self) -> int:
        """Return the number of this process, from 0 on."""


def encoded_batches(
    dataset: TrainingData,
    model: BaseModel,
    config: TrainingConfig,
    fingerprints: Mapping[str, str],
    processes: Processes,
    step: int,
) -> Generator[Batch]:
    """Yield this process' slice of each global batch that is left of a run.

    Args:
        dataset: Captioned images, pairs of noise and latents, or images with depth.
        model: Base model of the run.
        config: Options of the run.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.
        processes: Processes of the run, and which of them this is.
        step: Number of steps taken before.

    Raises:
        RefusedInputError: A sample cannot be used, pairs do not fit the model, or the cache cannot be written.
    """
    if step >= config.max_train_steps:
        return
    rank, count = processes.process_index, processes.num_processes
    size = config.train_batch_size * config.gradient_accumulation_steps * count
    plans = plan_batches(len(dataset), size, config.seed, step, rank=rank, world_size=count)
    left = islice(plans, config.max_train_steps - step)
    if isinstance(dataset, PairDataset):
        pairs = PairEncoder(model, config, dataset, fingerprints)
        yield from _loaded_ahead(left, pairs.load, pairs.encode, config)
    elif isinstance(dataset, DepthDataset):
        depth = DepthEncoder(model, config, dataset)
        yield from _loaded_ahead(left, depth.load, depth.encode, config)
    else:
        images = BatchEncoder(model, config)
        yield from _loaded_ahead(left, partial(images.load, dataset), images.encode, config)


def _loaded_ahead(
    plans: Iterator[BatchPlan],
    load: Callable[[BatchPlan], Loaded],
    encode: Callable[[BatchPlan, Loaded], Batch],
    config: TrainingConfig,
) -> Iterator[Batch]:
    """Yield the batch of each plan; threads load the next ones meanwhile."""
    for plan, loaded in load_ahead(plans, load, config.dataloader_num_workers):
        yield encode(plan, loaded)
