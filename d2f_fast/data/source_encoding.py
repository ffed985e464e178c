"""Load this process' pairs of a source and a target image, and encode both through the cache on disk.

The target is kept as the mean and the deviation of the autoencoder's posterior, of which each epoch samples anew, as
any other training image. The source is the mean, as in sampling.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import Batch
from d2f_fast.data.cache import CacheKey, EmbeddingCache, TensorCache
from d2f_fast.data.encoding import LoadedSlice, empty_slice, encode_one_by_one
from d2f_fast.data.images import preprocess, read_image, to_rgb
from d2f_fast.data.loading import refused_sample
from d2f_fast.data.order import Augmentation, BatchPlan
from d2f_fast.data.source_images import SourceTargetDataset, sizes_differ
from d2f_fast.errors import DatasetError, printable
from d2f_fast.files.hashes import FileHashes
from d2f_fast.image_sizes import Size, size_text, sizes_of
from d2f_fast.models.base_model import TEXT_COMPONENTS, BaseModel

if TYPE_CHECKING:
    import os

    from PIL import Image


class SourceTargetCache(TensorCache):
    """Keep the latents of pairs of images.

    `compute` returns {"source", "mean", "std"}, each [m, C, h, w].

    Args:
        folder: Folder of the cache, made when missing.
        settings: Everything that all pairs depend on beside their files.

    Raises:
        RefusedInputError: The folder cannot be made.
    """

    def __init__(self, folder: "str | os.PathLike[str]", settings: Mapping[str, str]) -> None:
        super().__init__(folder, {**settings, "kind": "source and target"}, torch.float32)
        self._hashes = FileHashes(self.folder / "hashes.jsonl")

    def key(self, dataset: SourceTargetDataset, index: int, flip: bool) -> CacheKey:
        """Return the key of one orientation of a pair.

        Args:
            dataset: The pairs.
            index: Index of the pair.
            flip: Whether the orientation is the mirrored one.

        Raises:
            DatasetError: A file cannot be read.
            RefusedInputError: The index of the hashes cannot be written.
        """
        try:
            content = dataset.content(index, self._hashes)
        except OSError as error:
            raise DatasetError(
                f"{printable(error.filename)} cannot be read ({error.strerror}): check the file"
            ) from error
        return self._key(printable(dataset.path(index)), {"flip": flip, "content": content})


class SourceTargetEncoder:
    """Load and encode the pairs of a plan into a batch for `AlignedTrainer.step`.

    Args:
        model: Base model whose autoencoder and text encoders encode.
        config: Options of the run.
        dataset: The pairs.

    Raises:
        RefusedInputError: The cache's folder cannot be made.
    """

    def __init__(self, model: BaseModel, config: TrainingConfig, dataset: SourceTargetDataset) -> None:
        self._model, self._config, self._dataset = model, config, dataset
        self._sizes = sizes_of(config.resolution or model.resolution)  # of each part of the data, or of all
        folder = config.cache_dir or Path(config.output_dir) / "cache"
        self._caches: dict[Size, SourceTargetCache] = {}
        if config.cache_latents:
            vae = model.fingerprint("vae")
            for size in set(self._sizes):
                settings = {"model": vae, "resolution": size_text(size)}
                self._caches[size] = SourceTargetCache(folder, settings)
        texts = model.fingerprint(*TEXT_COMPONENTS)
        self._texts = EmbeddingCache(folder, model=texts)

    def load(self, plan: BatchPlan) -> LoadedSlice:
        """Read cached tensors, and decode the images that are not cached. Any thread may call it.

        Args:
            plan: Pairs to load.

        Raises:
            DatasetError: A pair cannot be used.
            RefusedInputError: The index of the cache cannot be written.
        """
        loaded, size = LoadedSlice(), self._sizes[plan.part]
        cache = self._caches.get(size)
        for position, (index, augmentation) in enumerate(zip(plan.index, plan.augmentations, strict=True)):
            loaded.captions.append(self._dataset.captions(index).choose(augmentation.caption))
            if cache is not None:
                flip = self._config.random_flip and augmentation.mirrored
                loaded.keys.append(key := cache.key(self._dataset, index, flip))
                loaded.found |= (found := cache.read([key]))
                if found:
                    continue
            loaded.pixels[position] = self._pixels(index, augmentation, size)
        loaded.text_keys = [self._texts.key(caption) for caption in loaded.captions]
        loaded.found_texts = self._texts.read(loaded.text_keys)
        return loaded

    def encode(self, plan: BatchPlan, loaded: LoadedSlice) -> Batch:
        """Return the batch of a loaded slice, after encoding what the cache lacked.

        Args:
            plan: Pairs of the slice.
            loaded: Result of `load` for this plan.

        Raises:
            DatasetError: The encoding of an image or caption is not finite.
            RefusedInputError: The cache's folder cannot be written.
        """
        size, source_noise = self._sizes[plan.part], self._dataset.options.source_noise
        if not plan.index:
            batch = empty_slice(self._model, plan, *self._model.latents_shape(*size)[1:])
            return batch | {"source": batch["latents"], "source_noise": source_noise}
        if (cache := self._caches.get(size)) is None:
            tensors = self._posteriors(loaded, list(loaded.pixels))
        else:
            tensors = cache.complete(loaded.keys, loaded.found, lambda missing: self._posteriors(loaded, missing))
        condition = self._texts.complete(
            loaded.text_keys,
            loaded.found_texts,
            lambda missing: encode_one_by_one(self._model.encode_prompts, [[loaded.captions[i]] for i in missing]),
        )
        return {
            "mean": tensors["mean"],
            "std": tensors["std"],
            "source": self._model.scale_latents(tensors["source"]),
            "source_noise": source_noise,
            "encoder_hidden_states": condition["encoder_hidden_states"],
            "added_cond_kwargs": self._model.added_cond_kwargs(condition, *size),
            "offset": plan.offset,
            "global_batch_size": plan.global_batch_size,
        }

    def _posteriors(self, loaded: LoadedSlice, positions: list[int]) -> dict[str, Tensor]:
        """Return the latents of pairs; each image is encoded alone, so that its rounding depends on no other."""
        sources, targets = zip(*(loaded.pixels[position].split(1) for position in positions), strict=True)
        target = encode_one_by_one(self._model.encode_images, targets)
        return {"source": encode_one_by_one(self._model.encode_images, sources)["mean"], **target}

    def _pixels(self, index: int, augmentation: Augmentation, size: Size) -> Tensor:
        """Return the training pixels of a pair, [2, 3, H, W], both images cropped and mirrored alike."""
        pair, config = self._dataset[index], self._config
        source, target = (_read(path) for path in (pair.source, pair.target))
        if source.size != target.size:
            raise sizes_differ(pair.source, source.size, pair.target, target.size)
        flip = config.random_flip and augmentation.mirrored
        with refused_sample(printable(pair.target)):
            both = [preprocess(image, size, config.center_crop, flip, augmentation.crop) for image in (source, target)]
        return torch.stack(both)


def _read(path: Path) -> "Image.Image":
    """Return an image as upright RGB."""
    with refused_sample(printable(path)):
        return to_rgb(read_image(path))
