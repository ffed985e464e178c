"""Encode the images and captions of this process' slice of a batch, through the cache on disk."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.cache import CacheKey, EmbeddingCache, ImageIdentity, LatentCache
from d2f_fast.data.captions import Captions
from d2f_fast.data.loading import (
    CaptionedDataset,
    FileDataset,
    ImageDataset,
    KeyedDataset,
    ReadSample,
    augmented_pixels,
    read_sample,
    refused_sample,
)
from d2f_fast.data.order import Augmentation, BatchPlan
from d2f_fast.errors import printable
from d2f_fast.image_sizes import Size, sizes_of
from d2f_fast.models.base_model import TEXT_COMPONENTS, BaseModel

Input = TypeVar("Input")


@dataclass
class LoadedSlice:
    """This process' slice of a batch as the host loads it, before the networks encode what the cache lacks.

    Attributes:
        keys: Keys of the latents, one for each sample; empty without a latent cache.
        found: Latents that the cache has, by digest.
        pixels: Pixels of the samples that are still to be encoded, by position: [3, height, width] of an image, or
            [2, 3, height, width] of a source and a target image.
        captions: One caption for each sample.
        text_keys: Keys of the encoded captions.
        found_texts: Encoded captions that the cache has, by digest.
    """

    keys: list[CacheKey] = field(default_factory=list)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    pixels: dict[int, Tensor] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    text_keys: list[CacheKey] = field(default_factory=list)
    found_texts: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class BatchEncoder:
    """Load and encode the samples of a plan into a batch for `AlignedTrainer.step`.

    Where latents are cached, the hash of an image in memory and its captions are remembered for the life of the
    encoder, so that a sample is read once in a run and not once an epoch.

    Args:
        model: Base model whose autoencoder and text encoders encode.
        config: Options of the run.

    Raises:
        RefusedInputError: The cache's folder cannot be made, latents of random crops are to be cached, or neither the
            options nor the model say the resolution.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig) -> None:
        self._model, self._config = model, config
        self._sizes = sizes_of(config.resolution or model.resolution)  # of each part of the data, or of all
        folder = Path(config.cache_dir or Path(config.output_dir) / "cache")
        self._latents: dict[Size, LatentCache] = {}
        if config.cache_latents:
            vae = model.fingerprint("vae")
            for size in set(self._sizes):
                self._latents[size] = LatentCache(folder, model=vae, resolution=size, center_crop=config.center_crop)
        texts = model.fingerprint(*TEXT_COMPONENTS)
        self._texts = EmbeddingCache(folder, model=texts)
        self._identities: dict[int, ImageIdentity] = {}
        self._captions: dict[int, Captions] = {}

    def load(self, dataset: ImageDataset, plan: BatchPlan) -> LoadedSlice:
        """Read cached tensors, and decode the images whose latents are not cached.

        Any thread may call it, if the data set may be read from any thread.

        Args:
            dataset: Data set of the run, the same at each call.
            plan: Samples to load.

        Raises:
            DatasetError: A sample cannot be used.
            RefusedInputError: The index of the cache cannot be written.
        """
        loaded, size = LoadedSlice(), self._sizes[plan.part]
        latents = self._latents.get(size)
        for position, (index, augmentation) in enumerate(zip(plan.index, plan.augmentations, strict=True)):
            missing: ReadSample | None
            if latents is None:
                missing = read_sample(dataset, index)
                captions = missing.captions
            else:
                captions, missing = self._load_cached(latents, dataset, index, augmentation, loaded)
            if missing is not None:
                loaded.pixels[position] = self._pixels(missing, augmentation, size)
            loaded.captions.append(captions.choose(augmentation.caption))
        loaded.text_keys = [self._texts.key(caption) for caption in loaded.captions]
        loaded.found_texts = self._texts.read(loaded.text_keys)
        return loaded

    def encode(self, plan: BatchPlan, loaded: LoadedSlice) -> Batch:
        """Return the batch of a loaded slice, after encoding the images and captions that the cache lacked.

        Args:
            plan: Samples of the slice.
            loaded: Result of `load` for this plan.

        Raises:
            DatasetError: The encoding of an image or caption is not finite.
            RefusedInputError: The cache's folder cannot be written.
        """
        size = self._sizes[plan.part]
        if not plan.index:
            return empty_slice(self._model, plan, *self._model.latents_shape(*size)[1:])

        def encode_images(positions: Iterable[int]) -> dict[str, Tensor]:
            return encode_one_by_one(self._model.encode_images, [loaded.pixels[i][None] for i in positions])

        if (latents := self._latents.get(size)) is None:
            posterior = encode_images(loaded.pixels)
        else:
            posterior = latents.complete(loaded.keys, loaded.found, encode_images)
        condition = self._texts.complete(
            loaded.text_keys,
            loaded.found_texts,
            lambda missing: encode_one_by_one(self._model.encode_prompts, [[loaded.captions[i]] for i in missing]),
        )
        return {
            "mean": posterior["mean"],
            "std": posterior["std"],
            "encoder_hidden_states": condition["encoder_hidden_states"],
            "added_cond_kwargs": self._model.added_cond_kwargs(condition, *size),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }

    def _load_cached(
        self, latents: LatentCache, dataset: ImageDataset, index: int, augmentation: Augmentation, loaded: LoadedSlice
    ) -> tuple[Captions, ReadSample | None]:
        """Look one sample up in the latent cache, and read it only where something is missing.

        Returns:
            The sample's captions, and the sample itself if it must be encoded.
        """
        name, sample = f"sample {index}", None
        identity, captions = self._identities.get(index), self._captions.get(index)
        with refused_sample(name):
            if isinstance(dataset, KeyedDataset):
                identity = latents.identify(dataset.key(index))
            elif isinstance(dataset, FileDataset):
                path = dataset.path(index)
                identity, name = latents.identify(path), printable(path)
            if isinstance(dataset, CaptionedDataset):
                captions = dataset.captions(index)
        if identity is None or captions is None:
            sample = read_sample(dataset, index)
            name = sample.name
            if identity is None:
                identity = self._identities[index] = latents.identify(sample.image)
            if captions is None:
                captions = self._captions[index] = sample.captions
        key = latents.key(identity, self._config.random_flip and augmentation.mirrored, name)
        found = latents.read([key])
        loaded.keys.append(key)
        loaded.found |= found
        return captions, None if found else sample or read_sample(dataset, index)

    def _pixels(self, sample: ReadSample, augmentation: Augmentation, size: Size) -> Tensor:
        """Return the training pixels of a sample with the options of the run."""
        config = self._config
        return augmented_pixels(
            sample, augmentation, size, random_flip=config.random_flip, center_crop=config.center_crop
        )


def empty_slice(model: BaseModel, plan: BatchPlan, height: int, width: int) -> Batch:
    """Return the batch of a process that the last, small batch of an epoch leaves without a sample.

    Args:
        model: Base model of the run.
        plan: Plan without samples.
        height: Height of the latents.
        width: Width of the latents.
    """
    unet = model.unet.config
    return {
        "latents": torch.empty(0, unet.out_channels, height, width),
        "encoder_hidden_states": torch.empty(0, 1, unet.cross_attention_dim),
        "offset": plan.offset,
        "global_batch_size": plan.global_batch_size,
    }


def encode_one_by_one(encode: Callable[[Input], dict[str, Tensor]], batches: Sequence[Input]) -> dict[str, Tensor]:
    """Encode batches of one sample each.

    The rounding of a sample then depends on no other sample, and so not on which of them the cache already had.
    """
    encoded = [encode(batch) for batch in batches]
    return {name: torch.cat([tensors[name] for tensors in encoded]) for name in encoded[0]}
