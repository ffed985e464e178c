"""Compare pairs with the model that is to be trained, as far as its configuration says. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from d2f_fast.config import MAX_SIDE, TrainingConfig
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.image_sizes import Resolution, Size, side_multiple, simplest, sizes_of
from d2f_fast.models.configs import ModelConfigs, downsampling_of, resolution_of
from d2f_fast.models.options import ModelOptions

# A deviation in this range is accepted whatever the scaling factor is: that of strongly guided latents is above 1.
_USUAL_DEVIATION = (0.4, 2.5)
# Entries of meta.json that identify what made a pair, the component of `BaseModel.fingerprints`, and its name.
_ORIGINS = (
    ("vae", "vae", "autoencoder"),
    ("model", "unet", "model"),
    ("text_encoders", "text_encoders", "text encoder"),
)
# Shorter side of the smallest images, in pixels, of which the last layer of a network of LPIPS has a feature left.
_LEAST_SIDES = {"vgg": 16, "squeeze": 17, "alex": 31}


def options_for_pairs(config: TrainingConfig, dataset: PairDataset) -> TrainingConfig:
    """Return the options of a run on pairs, with what the pairs settle where it is left open.

    Args:
        config: Options of the run.
        dataset: The pairs.

    Returns:
        The same options, with no dropout, because the guidance of the pairs is built in; and with the size of the
        pairs, where they state it.
    """
    stated = [dataset.common_meta(name) for name in ("height", "width")]
    sides = [side for side in stated if type(side) is int and 0 < side <= MAX_SIDE]
    known = len(sides) == len(stated)
    return dataclasses.replace(
        config,
        caption_dropout=0.0 if config.caption_dropout is None else config.caption_dropout,
        resolution=config.resolution or (simplest(sides) if known else None),
    )


def size_of_pairs(dataset: PairDataset, downsampling: int) -> Size:
    """Return the size of the images that pairs stand for, from the shape of their latents.

    Args:
        dataset: The pairs.
        downsampling: Number of pixels along each side of one latent.
    """
    _, height, width = dataset.shape
    return Size(height * downsampling, width * downsampling)


def check_pairs_of_run(
    config: TrainingConfig,
    options: ModelOptions,
    configs: ModelConfigs,
    trained: Resolution | None,
    *datasets: object,
) -> None:
    """Refuse pairs whose latents are not those of the model that is to be trained, from its files alone.

    Args:
        config: Options of the run.
        options: Options of the base model.
        configs: Configurations of the base model.
        trained: Resolution at which the base model was trained; None where its files do not say.
        datasets: Data of the run and held-out data, of which those that are not pairs are passed over.

    Raises:
        DatasetError: The pairs do not fit; see `check_pairs_fit`.
        RefusedInputError: Nothing says the resolution, or LPIPS has no features of images of this size.
    """
    if isinstance(datasets[0], PairDataset):
        config = options_for_pairs(config, datasets[0])
    downsampling = downsampling_of(configs.vae)
    resolution = config.resolution or trained or resolution_of(configs.unet, downsampling)
    scaling_factor = options.vae_custom_scale
    if scaling_factor is None and options.pretrained_vae_model_name_or_path is None:
        scaling_factor = float(configs.vae.get("scaling_factor", 0.18215))
    for dataset in datasets:
        if isinstance(dataset, PairDataset):
            check_pairs_fit(dataset, configs.unet.get("in_channels", 4), downsampling, scaling_factor, resolution)
            check_size_for_lpips(config, size_of_pairs(dataset, downsampling))


def check_pairs_fit(
    dataset: PairDataset, channels: int, downsampling: int, scaling_factor: float | None, resolution: Resolution
) -> None:
    """Refuse pairs whose latents are not those of a model.

    Args:
        dataset: The pairs.
        channels: Number of channels that the network takes.
        downsampling: Number of pixels along each side of one latent.
        scaling_factor: Factor on the latents of the autoencoder; None where it is not known, and not compared.
        resolution: Resolution of the run. One number is that of the shorter side of the pairs.

    Raises:
        DatasetError: The latents have another number of channels, size or scale, no images of their size can be
            generated, or two pairs were made with different models, and the data set was not told that this is meant.
    """
    found, size = dataset.shape[0], size_of_pairs(dataset, downsampling)
    first = printable(dataset.shards[0].path)
    if found != channels:
        raise DatasetError(
            f"{first} has latents of {found} channels, and the model takes {channels}: train the model that made the"
            " pairs"
        )
    if size.height % (multiple := side_multiple(downsampling)) or size.width % multiple:
        raise DatasetError(
            f"{first} has images of {size} pixels, and no others than multiples of {multiple} can be generated: make"
            " pairs of another size"
        )
    if isinstance(resolution, int) and min(size) != resolution:
        raise DatasetError(
            f"{first} has images whose shorter side is {min(size)} pixels, and the resolution is {resolution}: give"
            f" --resolution {min(size)}"
        )
    if isinstance(resolution, tuple) and size != sizes_of(resolution)[0]:
        raise DatasetError(
            f"{first} has images of {size} pixels, and the resolution is {sizes_of(resolution)[0]}: give --resolution"
            f" {size.height} {size.width}"
        )
    if scaling_factor is not None:
        _check_scale(dataset, scaling_factor)
    if not dataset.of_another_model:
        _check_common_origin(dataset)


def check_size_for_lpips(config: TrainingConfig, size: Size) -> None:
    """Refuse images of which nothing is left in the last layer of the network of LPIPS, where the loss has it.

    Args:
        config: Options of the run.
        size: Size of the images in pixels.

    Raises:
        RefusedInputError: The images are too small.
    """
    if config.lpips_weight and min(size) < (least := _LEAST_SIDES[config.lpips_net]):
        raise RefusedInputError(
            f"lpips_net {config.lpips_net} takes images of {least} pixels or more, and those of the pairs have {size}:"
            " give another lpips_net, or leave lpips_weight out"
        )


def check_origin(dataset: PairDataset, fingerprints: Mapping[str, str]) -> None:
    """Refuse pairs that another model or autoencoder made, unless the data set was told that this is meant.

    Args:
        dataset: The pairs.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.

    Raises:
        DatasetError: A shard states another model or autoencoder.
    """
    for key, part, name in () if dataset.of_another_model else _ORIGINS:
        for path, value in _stated(dataset, key):
            if value != fingerprints[part]:
                raise DatasetError(
                    f"{printable(path)} was made with another {name} ({_shown(value)}) than the one that is trained"
                    f" ({fingerprints[part]}): train the model that made the pairs, or add --pairs_of_another_model if"
                    " this is meant"
                )


def _check_common_origin(dataset: PairDataset) -> None:
    """Refuse shards that were made with different models, of which only one can be the one that is trained."""
    for key, _, name in _ORIGINS:
        stated = _stated(dataset, key)
        for path, value in stated:
            if value != stated[0][1]:
                first, own = stated[0]
                other = "" if first == path else f"{printable(first)} "
                raise DatasetError(
                    f"{printable(path)} {'has pairs' if first == path else 'was'} made with another {name}"
                    f" ({_shown(value)}) than {other or 'its first ones '}({_shown(own)}): give pairs of one {name}, or"
                    " add --pairs_of_another_model if this is meant"
                )


def _check_scale(dataset: PairDataset, scaling_factor: float) -> None:
    """Refuse latents that lack the scaling factor of the autoencoder, or have it twice.

    The deviation of scaled latents is about 1, so that of others is about the factor, or its inverse: the border is
    half way, as a ratio.
    """
    border = min(scaling_factor, 1 / scaling_factor) ** 0.5
    low, high = min(border, _USUAL_DEVIATION[0]), max(1 / border, _USUAL_DEVIATION[1])
    for shard, deviation in zip(dataset.shards, dataset.latents_deviations, strict=True):
        if not low <= deviation <= high:
            raise DatasetError(
                f"{printable(shard.path)}: the latents have a deviation of {deviation:.3g}, and those of the model"
                f" about 1 with its scaling factor of {scaling_factor:g}: store latents in the scale of the pipeline"
                " (the autoencoder's, times scaling_factor); if d2f pairs made them, give it more num_inference_steps"
                " or less guidance"
            )


def _stated(dataset: PairDataset, key: str) -> list[tuple[Path, str]]:
    """Return the different values of an entry of meta.json in each shard as text, with the file of the shard."""
    return [(shard.path, str(kind[key])) for shard in dataset.shards for kind in shard.kinds if key in kind]


def _shown(value: str) -> str:
    """Return the start of an entry of meta.json for a one-line message."""
    return printable(value[:40])
