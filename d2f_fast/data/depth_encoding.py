"""Load this process' images of a batch with their depth, and encode both through the cache on disk.

The network sees the latents of the image (`context`), and learns those of the depth. Both are the means of the
autoencoder's posterior, as in Marigold. The text is the empty prompt without padding, as in `MarigoldDepthPipeline`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.cache import CacheKey, TensorCache
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.depth_pixels import DepthPixels, depth_pixels
from d2f_fast.data.depth_source import DepthSample, DepthSource
from d2f_fast.data.encoding import empty_slice
from d2f_fast.data.order import Augmentation, BatchPlan
from d2f_fast.errors import DatasetError
from d2f_fast.files.hashes import FileHashes
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.marigold import check_one_text_encoder, empty_text

if TYPE_CHECKING:
    import os


class DepthDataset:
    """Images with depth that a model is trained on, and what it learns of the depth.

    Args:
        images: The images with their depth.
        options: Options of the depth; None for the defaults.

    Attributes:
        images: The images with their depth.
        options: Options of the depth.
        invalid: Share of the pixels without a depth, of each image that was read, by its index.
    """

    def __init__(self, images: DepthSource, options: DepthOptions | None = None) -> None:
        self.images, self.options = images, options or DepthOptions()
        self.invalid: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> DepthSample:
        sample = self.images[index]
        self.invalid[index] = 1 - float(sample.valid.mean())
        return sample

    def settings(self) -> dict[str, str | int | float]:
        """Return what a sample depends on beside its files, for the cache and for a continuation of the run."""
        images = self.images
        kinds: dict[str, str | int | float] = {"layout": images.layout, "least": images.least, "most": str(images.most)}
        return kinds | {"scale": str(images.scale), "normalization": self.options.depth_normalization}


class DepthCache(TensorCache):
    """Keep the latents of images and of their depth.

    `compute` returns {"context", "latents"}, each [m, C, h, w], and "mask" [m, 1, h, w].

    Args:
        folder: Folder of the cache, made when missing.
        settings: Everything that all samples depend on beside their files.

    Raises:
        RefusedInputError: The folder cannot be made.
    """

    def __init__(self, folder: "str | os.PathLike[str]", settings: Mapping[str, str | int | float]) -> None:
        settings = {name: str(value) for name, value in settings.items()} | {"kind": "depth"}
        super().__init__(folder, settings, torch.float32)
        self._hashes = FileHashes(self.folder / "hashes.jsonl")

    def key(self, dataset: DepthDataset, index: int, flip: bool) -> CacheKey:
        """Return the key of one orientation of an image and its depth.

        Args:
            dataset: Images with depth.
            index: Index of the image.
            flip: Whether the orientation is the mirrored one.

        Raises:
            DatasetError: A file cannot be read.
            RefusedInputError: The index of the hashes cannot be written.
        """
        try:
            content = dataset.images.content(index, self._hashes)
        except OSError as error:
            raise DatasetError(f"image {index} cannot be read ({error}): check the files") from error
        return self._key(f"image {index}", {"flip": flip, "content": content})


@dataclass
class LoadedDepth:
    """This process' slice of a batch as the host loads it, before the autoencoder encodes what the cache lacks.

    Attributes:
        keys: Keys of the latents, one for each sample; empty without a cache.
        found: Latents that the cache has, by digest.
        pixels: Pixels that are still to be encoded, by position.
    """

    keys: list[CacheKey] = field(default_factory=list)
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    pixels: dict[int, DepthPixels] = field(default_factory=dict)


class DepthEncoder:
    """Load and encode the images of a plan, with their depth, into a batch for `AlignedTrainer.step`.

    Args:
        model: Base model whose autoencoder encodes, and whose network sees one image.
        config: Options of the run.
        dataset: Images with depth.

    Raises:
        ModelError: The model has two text encoders, as SDXL.
        RefusedInputError: The cache's folder cannot be made.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig, dataset: DepthDataset) -> None:
        self._model, self._config, self._dataset = model, config, dataset
        self._resolution = config.resolution or model.resolution
        check_one_text_encoder(model.pipeline)
        self._text = empty_text(model.pipeline).cpu()
        self._cache = None
        if config.cache_latents:
            settings = dataset.settings() | {"model": model.fingerprint("vae"), "resolution": self._resolution}
            self._cache = DepthCache(config.cache_dir or Path(config.output_dir) / "cache", settings)

    def load(self, plan: BatchPlan) -> LoadedDepth:
        """Read cached latents, and decode the images and depth that are not cached. Any thread may call it.

        Args:
            plan: Samples to load.

        Raises:
            DatasetError: A sample cannot be used.
            RefusedInputError: The index of the cache cannot be written.
        """
        loaded = LoadedDepth()
        for position, (index, augmentation) in enumerate(zip(plan.index, plan.augmentations, strict=True)):
            if self._cache is not None:
                flip = self._config.random_flip and augmentation.mirrored
                loaded.keys.append(key := self._cache.key(self._dataset, index, flip))
                loaded.found |= (found := self._cache.read([key]))
                if found:
                    continue
            loaded.pixels[position] = self._pixels(index, augmentation)
        return loaded

    def encode(self, plan: BatchPlan, loaded: LoadedDepth) -> Batch:
        """Return the batch of a loaded slice, after encoding what the cache lacked.

        Args:
            plan: Samples of the slice.
            loaded: Result of `load` for this plan.

        Raises:
            DatasetError: An encoded image is not finite.
            RefusedInputError: The cache's folder cannot be written.
        """
        if not plan.index:
            side = self._resolution // self._model.downsampling
            batch = empty_slice(self._model, plan, side, side)
            return batch | {"context": batch["latents"], "mask": batch["latents"][:, :1]}
        if self._cache is None:
            tensors = self._encode(loaded, list(loaded.pixels))
        else:
            tensors = self._cache.complete(loaded.keys, loaded.found, lambda missing: self._encode(loaded, missing))
        return {
            "latents": tensors["latents"],
            "context": tensors["context"],
            "mask": tensors["mask"],
            "encoder_hidden_states": self._text.expand(len(plan.index), -1, -1),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }

    def _encode(self, loaded: LoadedDepth, positions: list[int]) -> dict[str, Tensor]:
        """Return the latents and masks of samples; each is encoded alone, so that its rounding depends on no other."""
        rows = [loaded.pixels[position] for position in positions]
        return {
            "context": torch.cat([self._latents(row.image) for row in rows]),
            "latents": torch.cat([self._latents(row.depth) for row in rows]),
            "mask": torch.stack([row.mask for row in rows]),
        }

    def _latents(self, pixels: Tensor) -> Tensor:
        """Return the scaled mean of the autoencoder's posterior of one image, [1, C, h, w]."""
        return self._model.scale_latents(self._model.encode_images(pixels[None])["mean"])

    def _pixels(self, index: int, augmentation: Augmentation) -> DepthPixels:
        """Return the training pixels of a sample with the options of the run."""
        config = self._config
        return depth_pixels(
            self._dataset[index],
            augmentation,
            self._resolution,
            self._model.downsampling,
            self._dataset.options.depth_normalization,
            random_flip=config.random_flip,
            center_crop=config.center_crop,
        )


def options_for_depth(config: TrainingConfig) -> TrainingConfig:
    """Return the options of a run on depth, with what the task settles where it is left open.

    Args:
        config: Options of the run.

    Returns:
        The same options, with the empty prompt alone; and for a new LoRA with its first and last layers, because the
        first one has to learn to see the image, and with a file for diffusers alone.
    """
    is_lora = config.adapter == "lora"
    first_last = config.first_last_layers
    if first_last is None and is_lora and config.init_lora is None:
        first_last = True
    lora_format = config.lora_format or ("diffusers" if is_lora else None)
    return dataclasses.replace(config, caption_dropout=0.0, first_last_layers=first_last, lora_format=lora_format)
