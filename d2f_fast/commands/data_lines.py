"""Say what a run trains on: the images, their size and number, how often each comes, and whether captions are cut."""

from collections.abc import Iterator, Sequence

from d2f_fast.data.depth_encoding import DepthDataset
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.long_captions import find_long_captions
from d2f_fast.data.mixed import MixedDataset, MixedImages
from d2f_fast.data.order import steps_per_epoch
from d2f_fast.data.pair_checks import size_of_pairs
from d2f_fast.data.pairs import PairDataset
from d2f_fast.data.source_images import SourceTargetDataset, SourceTargetFolder
from d2f_fast.errors import printable
from d2f_fast.image_sizes import Resolution, Size, sizes_of
from d2f_fast.training.batches import mixture_of_run
from d2f_fast.training.doubtful_options import doubts, doubts_about_pairs
from d2f_fast.training.summary import pair_tags
from d2f_fast.training.trainer import AlignedTrainer

_NAMED = 8  # repeated folders that a line names


def data_lines(
    trainer: AlignedTrainer,
    dataset: CaptionedImages | MixedImages | PairDataset | DepthDataset | SourceTargetDataset,
    folders: Sequence[str],
    resolution: Resolution | None,
) -> Iterator[str]:
    """Yield the lines that a run prints about its data before it starts.

    Args:
        trainer: Trainer of the run.
        dataset: What it trains on.
        folders: Folders of the training images, for messages.
        resolution: Resolution that was asked for; None for that of the model.
    """
    steps, size = trainer.config.max_train_steps, trainer.global_batch_size
    if isinstance(dataset, PairDataset):
        sizes: tuple[Size, ...] = (size_of_pairs(dataset, trainer.model.downsampling),)
        source = "size of the pairs"
    else:
        sizes = sizes_of(trainer.config.resolution or trainer.model.resolution)
        source = "the model's own size" if resolution is None else "option --resolution"
    order = "height x width; " if any(each.height != each.width for each in sizes) else ""
    yield f"trained at {' and '.join(map(str, dict.fromkeys(sizes)))} pixels ({order}{source})"
    if isinstance(dataset, DepthDataset):
        for images in dataset.sources:
            kinds = f"layout {images.layout}, normalisation {dataset.options.depth_normalization}"
            yield f"depth is learned from {printable(images.place)} ({kinds})"
        if trainer.config.distill:
            yield "the depth is learned as one step from zeros in place of noise, and is predicted so"
    elif isinstance(dataset, PairDataset):
        made = pair_tags(dataset)
        end = ": sample the result without guidance" if trainer.teacher is None else ""
        shards = f"{len(dataset.shards)} shard{'s' if len(dataset.shards) > 1 else ''}"
        yield (
            f"pairs of {shards}, made with guidance {made['d2f.pairs_guidance']} and solver"
            f" {made['d2f.pairs_solver']}{end}"
        )
        yield from dataset.doubts
        yield from doubts_about_pairs(trainer.config, dataset.common_meta("lora"))
    elif isinstance(dataset, SourceTargetDataset):
        share = dataset.options.source_noise
        yield f"the flow starts from the source images, with a share of {share:g} of noise, and ends at the targets"
        for pairs in dataset.folders:
            if pairs.captioned is None:
                yield f"{printable(pairs.folder)} has no captions: every prompt is empty"
            yield from _repeats_of(pairs)
    else:
        for folder in dataset.folders if isinstance(dataset, MixedImages) else (dataset,):
            yield from _repeats_of(folder)
    if isinstance(dataset, MixedDataset) and (mixture := dataset.mixture) is not None:
        each_size = [f", at {each} pixels" if len(set(sizes)) > 1 else "" for each in sizes]
        each_size = each_size if len(sizes) > 1 else each_size * len(mixture.sizes)
        for name, own, count, at in zip(folders, mixture.sizes, mixture.counts, each_size, strict=True):
            yield f"{printable(name)} has {own} images, and an epoch takes {count} from it{at}"
    an_epoch = steps_per_epoch(len(dataset), size, mixture_of_run(dataset, trainer.config))
    yield (
        f"{len(dataset)} {'pairs' if isinstance(dataset, PairDataset) else 'images'}, {size} per step: an epoch has"
        f" {an_epoch} steps, and {steps} steps are {steps / an_epoch:.4g} epochs"
    )
    # Only a size that was asked for can be doubted.
    yield from doubts(trainer.config, None if resolution is None else trainer.model.stated_resolution)
    # The model that made pairs cut long prompts, too.
    if (
        isinstance(dataset, CaptionedImages | MixedImages | SourceTargetDataset)
        and (long := find_long_captions(dataset, trainer.model.tokenizers)) is not None
    ):
        yield str(long)


def _repeats_of(images: CaptionedImages | SourceTargetFolder) -> Iterator[str]:
    """Yield the line that says which sub-folders of a folder are repeated, where some are."""
    if not images.repeats:
        return
    repeats = [f"{printable(folder)} {times} times" for folder, times in list(images.repeats.items())[:_NAMED]]
    more = f" and {len(images.repeats) - _NAMED} more folders" if len(images.repeats) > _NAMED else ""
    yield (
        f"{images.files} image files count as {len(images)} images, because the numbers of folders repeat them:"
        f" {', '.join(repeats)}{more}"
    )
