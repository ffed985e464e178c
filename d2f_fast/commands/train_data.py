"""Find the data of `d2f train`, and refuse options that do not go with it. Torch is not imported."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from d2f_fast.data.depth_options import check_depth_training
from d2f_fast.data.source_options import check_source_training
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.image_sizes import check_data_sets
from d2f_fast.training.teacher_options import check_no_distillation

if TYPE_CHECKING:
    from d2f_fast.commands.train import Train
    from d2f_fast.data.depth_source import DepthSource
    from d2f_fast.data.image_folder import CaptionedImages
    from d2f_fast.data.mixed import MixedImages
    from d2f_fast.data.pairs import PairDataset
    from d2f_fast.data.source_images import SourceTargetDataset

    TrainingFiles: TypeAlias = CaptionedImages | MixedImages | PairDataset | SourceTargetDataset | list[DepthSource]
    HeldOutFiles: TypeAlias = CaptionedImages | PairDataset | SourceTargetDataset | None

# Options that say how images are read and prepared, which pairs do without.
OF_CAPTIONS = ("image_column", "caption_column", "caption_extension")
_OF_IMAGE_TRAINING = ("center_crop", "random_flip", "cache_latents")


def training_files(command: "Train") -> "TrainingFiles":
    """Return what a run trains on, of which no image is read yet.

    Args:
        command: Options of the run, which `check_data` accepts.

    Raises:
        RefusedInputError: A folder or a shard cannot be used, or the weights do not fit the folders.
    """
    folders = command.folders
    if not folders:
        from d2f_fast.data.pairs import PairDataset  # It imports NumPy.

        return PairDataset(command.pairs or (), of_another_model=command.pairs_of_another_model)
    if command.task == "depth":
        from d2f_fast.data.depth_data import find_depth_sources  # It imports NumPy.
        from d2f_fast.data.mixed import mixture_of

        sources = find_depth_sources(folders, command.depth_options)
        mixture_of([len(source) for source in sources], command.dataset_weights)
        return sources
    if command.task == "image_to_image":
        return _source_targets(command, folders, command.dataset_weights)
    from d2f_fast.data.image_folder import CaptionedImages

    found = [CaptionedImages(folder, *_columns(command)) for folder in folders]
    if len(found) == 1 and command.dataset_weights is None:
        return found[0]
    from d2f_fast.data.mixed import MixedImages  # It imports NumPy.

    return MixedImages(found, command.dataset_weights)


def held_out_files(command: "Train") -> "HeldOutFiles":
    """Return the held-out images or pairs; None where there are none.

    Args:
        command: Options of the run.

    Raises:
        RefusedInputError: They cannot be used, or options about them contradict each other.
    """
    folder, pairs, steps = command.validation_data_dir, command.validation_pairs, command.options.validation_steps
    if folder is None and not pairs:
        if steps and not command.options.validation_prompts:
            raise RefusedInputError(
                "validation_steps needs something to validate with: add --validation_prompts, --validation_data_dir"
                " or --validation_pairs"
            )
        return None
    if folder is not None and pairs:
        raise RefusedInputError("give either --validation_data_dir or --validation_pairs")
    if not steps:
        raise RefusedInputError("held-out samples need --validation_steps, how often their loss is measured")
    if folder is None:
        from d2f_fast.data.pairs import PairDataset  # It imports NumPy.

        return PairDataset(pairs or (), of_another_model=command.pairs_of_another_model)
    if not Path(folder).is_dir():
        raise RefusedInputError(f"validation_data_dir: {printable(folder)} is not a folder: correct the path")
    if command.task == "image_to_image":
        return _source_targets(command, [folder])
    from d2f_fast.data.image_folder import CaptionedImages

    return CaptionedImages(folder, *_columns(command))


def known_settings(command: "Train", dataset: "TrainingFiles") -> dict[str, str | float]:
    """Return what a continuation of a run must match of its data, as far as it is known before torch is imported.

    Args:
        command: Options of the run.
        dataset: What it trains on.
    """
    settings: dict[str, str | float] = {}
    if command.task == "depth":
        settings["depth_normalization"] = command.depth_options.depth_normalization
    if command.task == "image_to_image":
        settings["source_noise"] = command.source_options.source_noise
    if len(command.folders) == 1:
        return settings
    from d2f_fast.data.mixed import MixedDataset, mixture_of, mixture_settings  # They import NumPy.
    from d2f_fast.data.pairs import PairDataset

    if isinstance(dataset, PairDataset):
        return dataset.settings()
    if isinstance(dataset, list):
        return settings | mixture_settings(mixture_of([len(source) for source in dataset], command.dataset_weights))
    return settings | mixture_settings(dataset.mixture if isinstance(dataset, MixedDataset) else None)


def check_data(command: "Train") -> None:
    """Refuse a folder that does not exist, images together with pairs, and options that have no effect.

    Args:
        command: Options of the run.

    Raises:
        RefusedInputError: An option cannot be used; the message says what to change.
    """
    _check_task(command)
    check_data_sets(command.options.resolution, max(1, len(command.folders)))
    if command.options.distill and not command.pairs and command.task != "depth":
        raise RefusedInputError(
            "distill needs --pairs, whose noise and latents are the two ends of the jump, or --task depth, whose jump"
            " starts from zeros"
        )
    if command.teacher_options.teacher is not None:
        check_no_distillation(distills=command.options.distill)
    if command.folders:
        if command.pairs:
            raise RefusedInputError("give either --train_data_dir or --pairs: a run trains on one of them")
        for folder in map(Path, command.folders):
            if not folder.is_dir():
                raise RefusedInputError(
                    f"train_data_dir: {printable(folder)} is not a folder: give the folder of the training images"
                )
        return
    if not command.pairs:
        raise RefusedInputError(
            "give --train_data_dir, the folder of the captioned images, or --pairs, what d2f pairs made"
        )
    for holder, names in ((command, (*OF_CAPTIONS, "dataset_weights")), (command.options, _OF_IMAGE_TRAINING)):
        _refuse_given(holder, names, "has no effect on pairs: leave it out")


def _source_targets(
    command: "Train", folders: Sequence[str], weights: Sequence[float] | None = None
) -> "SourceTargetDataset":
    """Return the pairs of source and target images in folders; several folders are mixed by their weights."""
    from d2f_fast.data.source_images import SourceTargetDataset, SourceTargetFolder  # They import NumPy.

    found = [SourceTargetFolder(folder, *_columns(command)) for folder in folders]
    for pairs in found:
        pairs.check_sizes()
    return SourceTargetDataset(found, command.source_options, weights)


def _columns(command: "Train") -> tuple[str | None, str | None, str | None]:
    """Return how captions are read, in the order that the folders take."""
    return command.image_column, command.caption_column, command.caption_extension


def _check_task(command: "Train") -> None:
    """Refuse options that have no effect on the task."""
    for task, options in (("depth", command.depth_options), ("image_to_image", command.source_options)):
        if command.task != task:
            names = [each.name for each in dataclasses.fields(options)]
            _refuse_given(options, names, f"needs --task {task}: add it, or leave the option out")
    if command.task == "image_to_image":
        if not command.folders:
            raise RefusedInputError(
                "task image_to_image needs --train_data_dir, a folder with the sub-folders source and target"
            )
        check_source_training(command.options, has_teacher=command.teacher_options.teacher is not None)
        _refuse_given(command, ("validation_pairs",), "does not go with --task image_to_image: leave it out")
    if command.task != "depth":
        return
    if not command.folders:
        raise RefusedInputError("task depth needs --train_data_dir, a folder of images with their depth")
    cure = "has no effect with --task depth, which reads no captions: leave it out"
    _refuse_given(command, OF_CAPTIONS, cure)
    _refuse_given(command.teacher_options, ("teacher",), "does not go with --task depth: leave it out")
    held_out = "validation_data_dir", "validation_pairs"
    _refuse_given(command, held_out, "does not go with --task depth: leave it out, and use d2f evaluate")
    _refuse_given(command.options, ("caption_dropout", "validation_prompts"), cure)
    check_depth_training(command.options)


def _refuse_given(options: Any, names: Iterable[str], why: str) -> None:
    """Refuse options that do not have their defaults.

    Args:
        options: Dataclass of options.
        names: Names of those that must not be given.
        why: End of the message, which says why and what to do.

    Raises:
        RefusedInputError: One of them is given.
    """
    defaults = {each.name: each.default for each in dataclasses.fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise RefusedInputError(f"{name} {why}")
