"""Load this process' pairs of a batch, and encode their prompts through the cache on disk."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.cache import CacheKey, EmbeddingCache
from d2f_fast.data.encoding import empty_slice, encode_one_by_one
from d2f_fast.data.order import BatchPlan
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import DatasetError, printable
from d2f_fast.models.base_model import BaseModel

# A deviation in this range is accepted whatever the scaling factor is: that of strongly guided latents is above 1.
_USUAL_DEVIATION = (0.4, 2.5)


@dataclass
class LoadedPairs:
    """This process' pairs of a batch as the host loads them.

    Attributes:
        latents: [b, C, h, w] float32.
        noise: [b, C, h, w] float32.
        prompts: One prompt for each pair.
        text_keys: Keys of the encoded prompts.
        found_texts: Encoded prompts that the cache has, by digest.
    """

    latents: Tensor
    noise: Tensor
    prompts: list[str] = field(default_factory=list)
    text_keys: list[CacheKey] = field(default_factory=list)
    found_texts: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class PairEncoder:
    """Load and encode the pairs of a plan into a batch for `AlignedTrainer.step`.

    Args:
        model: Base model whose text encoders encode.
        config: Options of the run.
        dataset: The pairs.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.

    Raises:
        DatasetError: The pairs do not fit the model; see `check_pairs`.
        RefusedInputError: The cache's folder cannot be made.
    """

    def __init__(
        self, model: BaseModel, config: TrainingConfig, dataset: PairDataset, fingerprints: Mapping[str, str]
    ) -> None:
        check_pairs(dataset, model, fingerprints, config.resolution or model.resolution)
        self._model, self._dataset = model, dataset
        texts = model.fingerprint("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        self._texts = EmbeddingCache(config.cache_dir or Path(config.output_dir) / "cache", model=texts)

    def load(self, plan: BatchPlan) -> LoadedPairs:
        """Read pairs and cached prompts. Any thread may call it.

        Args:
            plan: Pairs to load.

        Raises:
            DatasetError: A shard cannot be read, or a pair is not finite.
        """
        pairs = [self._dataset[index] for index in plan.index]
        for index, pair in zip(plan.index, pairs, strict=True):
            if not (np.isfinite(pair.latents).all() and np.isfinite(pair.noise).all()):
                raise DatasetError(f"pair {index} holds NaN or infinity: make its shard again")
        if not pairs:
            return LoadedPairs(torch.empty(0), torch.empty(0))
        latents, noise = (
            torch.from_numpy(np.stack([x.astype(np.float32) for x in arrays]))
            for arrays in ([pair.latents for pair in pairs], [pair.noise for pair in pairs])
        )
        loaded = LoadedPairs(latents, noise, [pair.prompt for pair in pairs])
        loaded.text_keys = [self._texts.key(prompt) for prompt in loaded.prompts]
        loaded.found_texts = self._texts.read(loaded.text_keys)
        return loaded

    def encode(self, plan: BatchPlan, loaded: LoadedPairs) -> Batch:
        """Return the batch of loaded pairs, after encoding the prompts that the cache lacked.

        Args:
            plan: Pairs of the slice.
            loaded: Result of `load` for this plan.

        Raises:
            DatasetError: The encoding of a prompt is not finite.
            RefusedInputError: The cache's folder cannot be written.
        """
        _, height, width = self._dataset.shape
        if not plan.index:
            return empty_slice(self._model, plan, height, width)
        condition = self._texts.complete(
            loaded.text_keys,
            loaded.found_texts,
            lambda missing: encode_one_by_one(self._model.encode_prompts, [[loaded.prompts[i]] for i in missing]),
        )
        side = self._model.downsampling
        return {
            "latents": loaded.latents,
            "noise": loaded.noise,
            "encoder_hidden_states": condition["encoder_hidden_states"],
            "added_cond_kwargs": self._model.added_cond_kwargs(condition, height * side, width * side),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }


def options_for_pairs(config: TrainingConfig, dataset: PairDataset) -> TrainingConfig:
    """Return the options of a run on pairs, with what the pairs settle where it is left open.

    Args:
        config: Options of the run.
        dataset: The pairs.

    Returns:
        The same options, with no dropout, because the guidance of the pairs is built in; and with the resolution of the
        pairs, where they state it.
    """
    sides = [dataset.common_meta(name) for name in ("height", "width")]
    known = all(isinstance(side, int) and side > 0 for side in sides)
    return dataclasses.replace(
        config,
        caption_dropout=0.0 if config.caption_dropout is None else config.caption_dropout,
        resolution=config.resolution or (min(sides) if known else None),
    )


def check_pairs(dataset: PairDataset, model: BaseModel, fingerprints: Mapping[str, str], resolution: int) -> None:
    """Refuse pairs that do not fit the model that is to be trained.

    Args:
        dataset: The pairs.
        model: Base model of the run.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.
        resolution: Resolution of the run, in pixels.

    Raises:
        DatasetError: The latents have another number of channels, size or scale, or the pairs were made with another
            model or autoencoder, and the data set was not told that this is meant.
    """
    channels, height, width = dataset.shape
    first = printable(dataset.shards[0].path)
    if channels != (wanted := model.unet.config.in_channels):
        raise DatasetError(
            f"{first} has latents of {channels} channels, and the model takes {wanted}: train the model that made the"
            " pairs"
        )
    if (side := min(height, width) * model.downsampling) != resolution:
        raise DatasetError(
            f"{first} has images whose shorter side is {side} pixels, and the resolution is {resolution}: give"
            f" --resolution {side}"
        )
    _check_scale(dataset, float(model.vae.config.scaling_factor))
    if not dataset.of_another_model:
        for shard in dataset.shards:
            _check_origin(printable(shard.path), shard.meta, fingerprints)


def _check_scale(dataset: PairDataset, scaling_factor: float) -> None:
    """Refuse latents that lack the scaling factor of the autoencoder, or have it twice.

    The deviation of scaled latents is about 1, so that of others is about the factor, or its inverse: the border is
    half way, as a ratio.
    """
    border = min(scaling_factor, 1 / scaling_factor) ** 0.5
    low, high = min(border, _USUAL_DEVIATION[0]), max(1 / border, _USUAL_DEVIATION[1])
    if not low <= (deviation := dataset.latents_deviation) <= high:
        raise DatasetError(
            f"{printable(dataset.shards[0].path)}: the latents have a deviation of {deviation:.3g}, and those of the"
            f" model about 1 with its scaling factor of {scaling_factor:g}: store latents in the scale of the pipeline,"
            " as d2f pairs does, or give the model's own --vae_custom_scale"
        )


def _check_origin(shard: str, meta: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Refuse a shard that another model or autoencoder made."""
    for key, part, name in (("vae", "vae", "autoencoder"), ("model", "unet", "model")):
        if key in meta and meta[key] != fingerprints[part]:
            raise DatasetError(
                f"{shard} was made with another {name} ({printable(str(meta[key])[:40])}) than the one that is trained"
                f" ({fingerprints[part]}): train the model that made the pairs, or add --pairs_of_another_model if this"
                " is meant"
            )
