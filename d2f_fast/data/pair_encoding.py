"""Load this process' pairs of a batch, and encode their prompts through the cache on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.cache import CacheKey, EmbeddingCache
from d2f_fast.data.encoding import empty_slice, encode_one_by_one
from d2f_fast.data.order import BatchPlan
from d2f_fast.data.pair_checks import check_origin, check_pairs_fit, check_size_for_lpips, size_of_pairs
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import DatasetError
from d2f_fast.image_sizes import Resolution
from d2f_fast.models.base_model import TEXT_COMPONENTS, BaseModel

# Largest number of float16. Latents and noise are far below it, and the squared error of more would overflow.
_LARGEST = 65504.0


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
        RefusedInputError: LPIPS has no features of images of this size, or the cache's folder cannot be made.
    """

    def __init__(
        self, model: BaseModel, config: TrainingConfig, dataset: PairDataset, fingerprints: Mapping[str, str]
    ) -> None:
        check_pairs(dataset, model, fingerprints, config.resolution or model.resolution)
        check_size_for_lpips(config, size_of_pairs(dataset, model.downsampling))
        self._model, self._dataset = model, dataset
        texts = model.fingerprint(*TEXT_COMPONENTS)
        self._texts = EmbeddingCache(config.cache_dir or Path(config.output_dir) / "cache", model=texts)

    def load(self, plan: BatchPlan) -> LoadedPairs:
        """Read pairs and cached prompts. Any thread may call it.

        Args:
            plan: Pairs to load.

        Raises:
            DatasetError: A shard cannot be read, or a number of a pair is not finite or beyond 65504.
        """
        pairs = [self._dataset[index] for index in plan.index]
        if not pairs:
            return LoadedPairs(torch.empty(0), torch.empty(0))
        with np.errstate(over="ignore"):  # What float32 does not hold becomes infinity.
            arrays = np.stack([np.stack([pair.latents, pair.noise]).astype(np.float32) for pair in pairs], axis=1)
        usable = (np.abs(arrays) <= _LARGEST).all(axis=(0, 2, 3, 4))
        if not usable.all():
            place = self._dataset.place(plan.index[int(usable.argmin())])
            raise DatasetError(f"{place} holds NaN, infinity, or a number beyond {_LARGEST:g}: make its shard again")
        latents, noise = map(torch.from_numpy, arrays)
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


def check_pairs(
    dataset: PairDataset, model: BaseModel, fingerprints: Mapping[str, str], resolution: Resolution
) -> None:
    """Refuse pairs that do not fit the model that is to be trained.

    Args:
        dataset: The pairs.
        model: Base model of the run.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.
        resolution: Resolution of the run.

    Raises:
        DatasetError: The latents have another number of channels, size or scale, or the pairs were made with another
            model, autoencoder or text encoder, and the data set was not told that this is meant.
    """
    channels: int = model.unet.config.in_channels
    check_pairs_fit(dataset, channels, model.downsampling, float(model.vae.config.scaling_factor), resolution)
    check_origin(dataset, fingerprints)
