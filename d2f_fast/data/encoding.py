"""What a training step is fed: pictures and captions of its share, encoded, through the cache on disk."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.cache import CacheKey, EmbeddingCache, LatentCache
from d2f_fast.data.captions import choose_caption, validated_text
from d2f_fast.data.images import DECODING_ERRORS
from d2f_fast.data.loading import ImageDataset, load_sample
from d2f_fast.data.order import BatchPlan
from d2f_fast.errors import DatasetError
from d2f_fast.models.base_model import BaseModel


class LoadedShare(NamedTuple):
    """What the host knows of a share before the networks encode the rest of it.

    Attributes:
        keys: of its latents; none without a cache for them.
        found: the latents that the cache has, by digest.
        pixels: [3, resolution, resolution] of the pictures that are to be encoded, by position.
        captions: one a sample.
        text_keys, found_texts: as of the latents, of the captions.
    """

    keys: list[CacheKey]
    found: dict[str, dict[str, Tensor]]
    pixels: dict[int, Tensor]
    captions: list[str]
    text_keys: list[CacheKey]
    found_texts: dict[str, dict[str, Tensor]]


class BatchEncoder:
    """Loads and encodes the samples that a plan names, as `AlignedTrainer.step` takes them.

    Args:
        model: whose autoencoder and text encoders encode.
        config: of the run.

    Raises:
        RefusedInputError: the cache's folder cannot be made, or latents are to be cached of random crops.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig) -> None:
        self._model, self._config = model, config
        folder = Path(config.cache_dir or Path(config.output_dir) / "cache")
        self._latents = None
        if config.cache_latents:
            vae = model.fingerprint("vae")
            self._latents = LatentCache(folder, model=vae, resolution=config.resolution, center_crop=config.center_crop)
        texts = model.fingerprint("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        self._texts = EmbeddingCache(folder, model=texts)

    def load(self, dataset: ImageDataset, plan: BatchPlan) -> LoadedShare:
        """What of a share the host can do: read it from the cache, and decode the pictures that are not there.

        From any thread, if the dataset may be read from it.

        Raises:
            DatasetError: a sample that cannot be used.
        """
        positions = range(len(plan.index))
        if self._latents is None:
            samples = [self._load(dataset, plan, position) for position in positions]
            keys, found = list[CacheKey](), dict[str, dict[str, Tensor]]()
            pixels, captions = dict(enumerate(p for p, _ in samples)), [caption for _, caption in samples]
        else:
            keys, captions = self._keys(self._latents, dataset, plan)
            found = self._latents.read(keys)
            missing = [position for position in positions if keys[position].digest not in found]
            pixels = {position: self._load(dataset, plan, position)[0] for position in missing}
        texts = [self._texts.key(caption) for caption in captions]
        return LoadedShare(keys, found, pixels, captions, texts, self._texts.read(texts))

    def encode(self, plan: BatchPlan, loaded: LoadedShare) -> Batch:
        """Posterior and text condition of a share that was loaded, encoding what the cache had not.

        Raises:
            DatasetError: a picture or caption whose encoding is not finite.
        """
        if not plan.index:
            return self._empty_share(plan)

        def encode_images(positions: Iterable[int]) -> dict[str, Tensor]:
            return _one_by_one(self._model.encode_images, [loaded.pixels[i][None] for i in positions])

        if self._latents is None:
            posterior = encode_images(loaded.pixels)
        else:
            posterior = self._latents.complete(loaded.keys, loaded.found, encode_images)
        condition = self._texts.complete(
            loaded.text_keys,
            loaded.found_texts,
            lambda missing: _one_by_one(self._model.encode_prompts, [[loaded.captions[i]] for i in missing]),
        )
        side = self._config.resolution
        return {
            "mean": posterior["mean"],
            "std": posterior["std"],
            "encoder_hidden_states": condition["encoder_hidden_states"],
            "added_cond_kwargs": self._model.added_cond_kwargs(condition, side, side),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }

    def _load(self, dataset: ImageDataset, plan: BatchPlan, position: int) -> tuple[Tensor, str]:
        """Pixels and caption of one sample of the share."""
        return load_sample(
            dataset,
            plan.index[position],
            plan.draws[position],
            self._config.resolution,
            random_flip=self._config.random_flip,
            center_crop=self._config.center_crop,
        )

    def _keys(self, latents: LatentCache, dataset: ImageDataset, plan: BatchPlan) -> tuple[list[CacheKey], list[str]]:
        """Where the share's latents are cached, and its captions."""
        keys, captions = [], []
        for index, draws in zip(plan.index, plan.draws, strict=True):
            flip = self._config.random_flip and draws.mirrored
            # Datasets that can name a file and its caption without decoding it are not decoded.
            if hasattr(dataset, "path") and hasattr(dataset, "text"):
                text = dataset.text(index)
                keys.append(latents.key(dataset.path(index), flip))
            else:
                item, name = dataset[index], f"sample {index}"
                source, text = item.get("image"), validated_text(item.get("text"), f'{name}: "text"')
                if not isinstance(source, Image.Image):
                    raise DatasetError(f'{name}: "image" must be a PIL image, got {type(source).__name__}')
                try:
                    keys.append(latents.key(source, flip, name))
                except DECODING_ERRORS as error:
                    raise DatasetError(f"{name}: {error}") from error
            captions.append(choose_caption(text, draws.caption))
        return keys, captions

    def _empty_share(self, plan: BatchPlan) -> Batch:
        """Share of a process that a last, small batch of an epoch leaves without a sample."""
        unet = self._model.unet.config
        side = self._config.resolution // self._model.downsampling
        return {
            "latents": torch.empty(0, unet.in_channels, side, side),
            "encoder_hidden_states": torch.empty(0, 1, unet.cross_attention_dim),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }


def _one_by_one(encode: Callable[[Any], dict[str, Tensor]], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Encode batches of one: rounding then depends on no neighbour, and so on no kill that left a cache half filled."""
    encoded = [encode(batch) for batch in batches]
    return {name: torch.cat([tensors[name] for tensors in encoded]) for name in encoded[0]}
