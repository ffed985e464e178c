"""Load this process' images of a batch with their depth, and encode both through the cache on disk.

The network sees the latents of the image (`context`), and learns those of the depth. Both are the means of the
autoencoder's posterior, as in Marigold. The text is the empty prompt without padding, as in `MarigoldDepthPipeline`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from d2f_fast.data.mixed import locate, mixture_of
from d2f_fast.data.order import Augmentation, BatchPlan
from d2f_fast.errors import DatasetError
from d2f_fast.files.hashes import FileHashes
from d2f_fast.image_sizes import Size, size_text, sizes_of
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.configs import check_one_text_encoder
from d2f_fast.models.marigold import empty_text, text_encoders_of

if TYPE_CHECKING:
    import os


class DepthDataset:
    """Images with depth that a model is trained on, and what it learns of the depth.

    Args:
        sources: The images with their depth: one source, or several that are mixed, each with its own unit and range.
        options: Options of the depth; None for the defaults.
        weights: Weight of each of several sources; None for the numbers of their images. See `Mixture`.

    Attributes:
        sources: The sources of the images.
        options: Options of the depth.
        mixture: How several sources are mixed; None for a single one.
        invalid: Share of the pixels without a depth, of each image that was read, by its index.

    Raises:
        RefusedInputError: The weights do not fit the sources.
    """

    def __init__(
        self,
        sources: DepthSource | Sequence[DepthSource],
        options: DepthOptions | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.sources = (sources,) if isinstance(sources, DepthSource) else tuple(sources)
        self.options = options or DepthOptions()
        self.mixture = mixture_of([len(source) for source in self.sources], weights)
        self.invalid: dict[int, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> DepthSample:
        source, own_index = locate(self.sources, self.mixture, index)
        sample = source[own_index]
        self.invalid[index] = 1 - float(sample.valid.mean())
        return sample

    def content(self, index: int, hash_of_file: Callable[[Path], str]) -> str:
        """Return a text that changes when an image, its depth, or how its source reads them changes.

        Args:
            index: Index of the image.
            hash_of_file: Function that returns the hash of a file.

        Raises:
            OSError: A file cannot be read.
        """
        source, own_index = locate(self.sources, self.mixture, index)
        return f"{_reading(source)} {source.content(own_index, hash_of_file)}"

    def settings(self) -> dict[str, str | float]:
        """Return what the samples depend on beside their files, which a continuation of the run must match."""
        first, *others = readings = [_reading(source) for source in self.sources]
        if others:
            first = {name: ", ".join(str(reading[name]) for reading in readings) for name in first}
        return first | {"normalization": self.options.depth_normalization}


def _reading(source: DepthSource) -> dict[str, str | float]:
    """Return how a source reads its files."""
    return {"layout": source.layout, "least": source.least, "most": str(source.most), "scale": str(source.scale)}


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
            content = dataset.content(index, self._hashes)
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
        self._sizes = sizes_of(config.resolution or model.resolution)  # of each part of the data, or of all
        check_one_text_encoder(text_encoders_of(model.pipeline))
        self._text = empty_text(model.pipeline).cpu()
        self._caches: dict[Size, DepthCache] = {}
        if config.cache_latents:
            settings = {"normalization": dataset.options.depth_normalization, "model": model.fingerprint("vae")}
            folder = config.cache_dir or Path(config.output_dir) / "cache"
            for size in set(self._sizes):
                resolution = size_text(size.height if size.height == size.width else size)
                self._caches[size] = DepthCache(folder, settings | {"resolution": resolution})

    def load(self, plan: BatchPlan) -> LoadedDepth:
        """Read cached latents, and decode the images and depth that are not cached. Any thread may call it.

        Args:
            plan: Samples to load.

        Raises:
            DatasetError: A sample cannot be used.
            RefusedInputError: The index of the cache cannot be written.
        """
        loaded, size = LoadedDepth(), self._sizes[plan.part]
        cache = self._caches.get(size)
        for position, (index, augmentation) in enumerate(zip(plan.index, plan.augmentations, strict=True)):
            if cache is not None:
                flip = self._config.random_flip and augmentation.mirrored
                loaded.keys.append(key := cache.key(self._dataset, index, flip))
                loaded.found |= (found := cache.read([key]))
                if found:
                    continue
            loaded.pixels[position] = self._pixels(index, augmentation, size)
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
        size = self._sizes[plan.part]
        if not plan.index:
            batch = empty_slice(self._model, plan, *self._model.latents_shape(*size)[1:])
            batch |= {"context": batch["latents"], "mask": batch["latents"][:, :1]}
            return self._with_start(batch)
        if (cache := self._caches.get(size)) is None:
            tensors = self._encode(loaded, list(loaded.pixels))
        else:
            tensors = cache.complete(loaded.keys, loaded.found, lambda missing: self._encode(loaded, missing))
        batch = {
            "latents": tensors["latents"],
            "context": tensors["context"],
            "mask": tensors["mask"],
            "encoder_hidden_states": self._text.expand(len(plan.index), -1, -1),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }
        return self._with_start(batch)

    def _with_start(self, batch: Batch) -> Batch:
        """Return the batch with zeros in place of the noise where a single jump is learned."""
        return batch | {"noise": torch.zeros_like(batch["latents"])} if self._config.distill else batch

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

    def _pixels(self, index: int, augmentation: Augmentation, size: Size) -> DepthPixels:
        """Return the training pixels of a sample with the options of the run."""
        config = self._config
        return depth_pixels(
            self._dataset[index],
            augmentation,
            size,
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
        first one has to learn to see the image.
    """
    first_last = config.first_last_layers
    if first_last is None and config.adapter == "lora" and config.init_lora is None:
        first_last = True
    return dataclasses.replace(config, caption_dropout=0.0, first_last_layers=first_last)
