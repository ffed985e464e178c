"""What a training step is fed: pictures and captions of its share, encoded, through the cache on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from d2f_fast.base_model import BaseModel
from d2f_fast.cache import CacheKey, EmbeddingCache, LatentCache
from d2f_fast.config import TrainingConfig
from d2f_fast.data import BatchPlan, ImageDataset, choose_caption, load_sample
from d2f_fast.errors import DatasetError
from d2f_fast.image_folder import validated_text


class BatchEncoder:
    """Encodes the samples that a plan names, as `AlignedTrainer.step` takes them.

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

    def __call__(self, dataset: ImageDataset, plan: BatchPlan) -> dict[str, Any]:
        """Posterior and text condition of one share.

        Raises:
            DatasetError: a sample that cannot be used.
        """
        if not plan.index:
            return self._empty_share(plan)
        if self._latents is None:
            samples = [self._load(dataset, plan, position) for position in range(len(plan.index))]
            captions = [caption for _, caption in samples]
            posterior = self._model.encode_images(torch.stack([pixels for pixels, _ in samples]))
        else:
            keys, captions = self._keys(self._latents, dataset, plan)
            posterior = self._latents.get_or_compute(
                keys,
                lambda missing: _one_by_one(
                    self._model.encode_images, [self._load(dataset, plan, i)[0][None] for i in missing]
                ),
            )
        condition = self._texts.get_or_compute(
            [self._texts.key(caption) for caption in captions],
            lambda missing: _one_by_one(self._model.encode_prompts, [[captions[i]] for i in missing]),
        )
        side = self._config.resolution
        return {
            **posterior,
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
            # Datasets that can name a file and its caption without decoding it are not decoded.
            if hasattr(dataset, "path") and hasattr(dataset, "text"):
                source, text, name = dataset.path(index), dataset.text(index), None
            else:
                item, name = dataset[index], f"sample {index}"
                source, text = item.get("image"), validated_text(item.get("text"), f'{name}: "text"')
                if not isinstance(source, Image.Image):
                    raise DatasetError(f'{name}: "image" must be a PIL image, got {type(source).__name__}')
            keys.append(latents.key(source, self._config.random_flip and draws.mirrored, name))
            captions.append(choose_caption(text, draws.caption))
        return keys, captions

    def _empty_share(self, plan: BatchPlan) -> dict[str, Any]:
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
