"""Make the batches of a run: plan them, load them ahead of the step, and encode what the cache lacks."""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeAlias

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.depth_encoding import DepthDataset, DepthEncoder
from d2f_fast.data.depth_options import check_depth_training
from d2f_fast.data.encoding import BatchEncoder
from d2f_fast.data.loading import ImageDataset, check_dataset, load_ahead
from d2f_fast.data.mixed import MixedDataset, mixture_settings
from d2f_fast.data.order import BatchPlan, Mixture, plan_batches
from d2f_fast.data.pair_encoding import PairEncoder
from d2f_fast.data.pairs import PairDataset
from d2f_fast.data.source_encoding import SourceTargetEncoder
from d2f_fast.data.source_images import SourceTargetDataset
from d2f_fast.data.source_options import check_source_training
from d2f_fast.errors import RefusedInputError
from d2f_fast.image_sizes import check_data_sets, sizes_differ
from d2f_fast.models.base_model import BaseModel

TrainingData: TypeAlias = ImageDataset | PairDataset | DepthDataset | SourceTargetDataset


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
        dataset: Captioned images, pairs of noise and latents, images with depth, or pairs of source and target images.
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
    mixture = mixture_of_run(dataset, config)
    plans = plan_batches(len(dataset), size, config.seed, step, rank=rank, world_size=count, mixture=mixture)
    left = islice(plans, config.max_train_steps - step)
    load, encode = loader_and_encoder(dataset, model, config, fingerprints)
    for plan, loaded in load_ahead(left, load, config.dataloader_num_workers):
        yield encode(plan, loaded)


def check_run(
    dataset: TrainingData, validation: TrainingData | None, config: TrainingConfig, *, has_teacher: bool
) -> None:
    """Refuse data that a run cannot use, before its first step.

    Args:
        dataset: What the run trains on.
        validation: Held-out samples; None for none.
        config: Options of the run.
        has_teacher: Whether the velocity of another model is learned.

    Raises:
        RefusedInputError: A data set is empty or malformed, does not go with the options, or the held-out samples start
            the flow in another way than the training.
    """
    for samples in (dataset, *(() if validation is None else (validation,))):
        check_dataset(samples)
        if isinstance(samples, SourceTargetDataset):
            check_source_training(config, has_teacher=has_teacher)
        if isinstance(samples, DepthDataset):
            check_depth_training(config)
        elif config.distill and not isinstance(samples, PairDataset):
            raise RefusedInputError(
                "distill learns the jump from the noise of pairs, or from zeros to depth: give pairs or images with"
                " depth, or leave it out"
            )
    mixture_of_run(dataset, config)
    if validation is None:
        return
    own, held_out = (
        each.options.source_noise if isinstance(each, SourceTargetDataset) else None for each in (dataset, validation)
    )
    if own != held_out:
        starts = [
            "from noise" if share is None else f"from source images with source_noise {share:g}"
            for share in (own, held_out)
        ]
        raise RefusedInputError(
            f"the flow of the training starts {starts[0]}, and that of the validation {starts[1]}: give held-out"
            " samples with the same start"
        )


def mixture_of_run(dataset: TrainingData, config: TrainingConfig) -> Mixture | None:
    """Return how the data sets of a run are mixed, kept apart where their images have different sizes; None for one.

    Args:
        dataset: Captioned images, pairs of noise and latents, or images with depth.
        config: Options of the run.

    Raises:
        RefusedInputError: The resolution does not say which size each data set has.
    """
    mixture = dataset.mixture if isinstance(dataset, MixedDataset) else None
    check_data_sets(config.resolution, 1 if mixture is None else len(mixture.sizes))
    if mixture is None or config.resolution is None or not sizes_differ(config.resolution):
        return mixture
    return dataclasses.replace(mixture, apart=True)


def data_settings(dataset: TrainingData) -> dict[str, str | float]:
    """Return what a continuation of a run must match of its data, beside the number of samples.

    Args:
        dataset: Captioned images, pairs of noise and latents, images with depth, or pairs of source and target images.
    """
    of_depth = dataset.settings() if isinstance(dataset, DepthDataset) else {}
    settings: dict[str, str | float] = {f"depth_{name}": value for name, value in of_depth.items()}
    if isinstance(dataset, PairDataset | SourceTargetDataset):
        settings |= dataset.settings()
    return settings | mixture_settings(dataset.mixture if isinstance(dataset, MixedDataset) else None)


def loader_and_encoder(
    dataset: TrainingData, model: BaseModel, config: TrainingConfig, fingerprints: Mapping[str, str]
) -> tuple[Callable[[BatchPlan], Any], Callable[[BatchPlan, Any], Batch]]:
    """Return the function that loads the samples of a plan, in any thread, and the one that makes a batch of them.

    Args:
        dataset: Captioned images, pairs of noise and latents, images with depth, or pairs of source and target images.
        model: Base model of the run.
        config: Options of the run.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.

    Raises:
        RefusedInputError: Pairs do not fit the model, or the cache's folder cannot be made.
    """
    if isinstance(dataset, PairDataset):
        pairs = PairEncoder(model, config, dataset, fingerprints)
        return pairs.load, pairs.encode
    if isinstance(dataset, DepthDataset):
        depth = DepthEncoder(model, config, dataset)
        return depth.load, depth.encode
    if isinstance(dataset, SourceTargetDataset):
        from_source = SourceTargetEncoder(model, config, dataset)
        return from_source.load, from_source.encode
    images = BatchEncoder(model, config)
    return partial(images.load, dataset), images.encode
