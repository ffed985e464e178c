"""Batches encoded through the cache: which samples are read, decoded and hashed, and how often."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2f_fast.config import TrainingConfig
from d2f_fast.data import cache as cache_module
from d2f_fast.data import loading as loading_module
from d2f_fast.data.captions import Captions
from d2f_fast.data.encoding import BatchEncoder
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.images import preprocess
from d2f_fast.data.order import Mixture, plan_batches
from d2f_fast.image_sizes import Size
from d2f_fast.models.base_model import BaseModel

COUNT = 5
BATCH_SIZE = 2
STEPS_PER_EPOCH = 3


class Images:
    """Captioned images in memory, which note how often each is read."""

    def __init__(self) -> None:
        self.reads = [0] * COUNT
        self.pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        self.reads[index] += 1
        return {"image": Image.fromarray(self.pixels[index]), "text": "abcde"[index]}


class KeyedImages(Images):
    """Images with a key of their own and captions, both known without reading."""

    version = "1"

    def key(self, index: int) -> str:
        return f"{self.version}/{index}"

    def captions(self, index: int) -> Captions:
        return Captions(("abcde"[index],))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> BaseModel:
    return BaseModel.load(tiny_folder)


def encode(model: BaseModel, dataset: Any, folder: Path, epochs: int = 3, **options: Any) -> list[dict[str, Any]]:
    """Batches of one run."""
    settings = {"resolution": 16, "cache_latents": True, "center_crop": True, "random_flip": False, **options}
    encoder = BatchEncoder(model, TrainingConfig(output_dir=str(folder), **settings))
    plans = islice(plan_batches(COUNT, BATCH_SIZE, 0), epochs * STEPS_PER_EPOCH)
    return [encoder.encode(plan, encoder.load(dataset, plan)) for plan in plans]


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in ("mean", "std", "encoder_hidden_states"):
            assert torch.equal(one[name], other[name])


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers of images that were converted and hashed."""
    counts = {"converted": 0, "hashed": 0}
    to_rgb, identify = loading_module.to_rgb, cache_module.LatentCache.identify

    def counted_to_rgb(image: Image.Image) -> Image.Image:
        counts["converted"] += 1
        return to_rgb(image)

    def counted_identify(self: cache_module.LatentCache, image: Any) -> cache_module.ImageIdentity:
        counts["hashed"] += isinstance(image, Image.Image)
        return identify(self, image)

    monkeypatch.setattr(loading_module, "to_rgb", counted_to_rgb)
    monkeypatch.setattr(cache_module.LatentCache, "identify", counted_identify)
    return counts


def test_image_in_memory_is_read_and_hashed_once_in_a_run(
    model: BaseModel, tmp_path: Path, work: dict[str, int]
) -> None:
    first, second = Images(), Images()
    batches = encode(model, first, tmp_path)
    assert first.reads == [1] * COUNT
    assert work == {"converted": COUNT, "hashed": COUNT}
    assert_same(encode(model, second, tmp_path), batches)
    assert second.reads == [1] * COUNT
    assert work == {"converted": 2 * COUNT, "hashed": 2 * COUNT}


def test_image_with_random_flips_is_read_at_most_once_for_each_orientation(
    model: BaseModel, tmp_path: Path, work: dict[str, int]
) -> None:
    dataset = Images()
    encode(model, dataset, tmp_path, epochs=8, random_flip=True)
    assert dataset.reads == [2] * COUNT
    assert work["hashed"] == COUNT


def test_keyed_dataset_is_not_read_where_its_latents_are_cached(
    model: BaseModel, tmp_path: Path, work: dict[str, int]
) -> None:
    first, second, changed = KeyedImages(), KeyedImages(), KeyedImages()
    batches = encode(model, first, tmp_path)
    assert first.reads == [1] * COUNT
    assert_same(encode(model, second, tmp_path), batches)
    assert second.reads == [0] * COUNT
    changed.version, changed.pixels = "2", 255 - changed.pixels
    renewed = encode(model, changed, tmp_path)
    assert changed.reads == [1] * COUNT
    assert all(not torch.equal(one["mean"], other["mean"]) for one, other in zip(renewed, batches, strict=True))
    assert work == {"converted": 2 * COUNT, "hashed": 0}


def test_key_without_captions_reads_each_sample_once_for_its_caption(model: BaseModel, tmp_path: Path) -> None:
    class WithoutCaptions(Images):
        def key(self, index: int) -> str:
            return str(index)

    first, second = WithoutCaptions(), WithoutCaptions()
    batches = encode(model, first, tmp_path)
    assert_same(encode(model, second, tmp_path), batches)
    assert first.reads == second.reads == [1] * COUNT


def test_folder_is_decoded_only_where_its_latents_are_not_cached(
    model: BaseModel, tmp_path: Path, work: dict[str, int]
) -> None:
    in_memory, folder = Images(), tmp_path / "images"
    folder.mkdir()
    for index in range(COUNT):
        Image.fromarray(in_memory.pixels[index]).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("abcde"[index])
    batches = encode(model, CaptionedImages(folder), tmp_path / "run")
    assert_same(encode(model, in_memory, tmp_path / "memory"), batches)
    work["converted"] = 0
    assert_same(encode(model, CaptionedImages(folder), tmp_path / "run"), batches)
    assert work["converted"] == 0


def test_without_a_latent_cache_each_epoch_reads_each_image(model: BaseModel, tmp_path: Path) -> None:
    cached, uncached = Images(), Images()
    batches = encode(model, cached, tmp_path / "cached")
    assert_same(encode(model, uncached, tmp_path / "uncached", cache_latents=False), batches)
    assert uncached.reads == [3] * COUNT


def test_process_without_a_sample_gets_an_empty_batch(model: BaseModel, tmp_path: Path) -> None:
    encoder = BatchEncoder(model, TrainingConfig(output_dir=str(tmp_path), resolution=16))
    plan = next(plan_batches(COUNT, 1, 0, rank=1, world_size=2))
    batch = encoder.encode(plan, encoder.load(Images(), plan))
    assert batch["latents"].shape == (0, 4, 8, 8)
    assert batch["encoder_hidden_states"].shape == (0, 1, 16)
    assert (batch["offset"], batch["global_batch_size"]) == (1, 1)


class MixedSizes(Images):
    """Images of which the first two belong to one data set, and the others to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture((2, 3), (2.0, 3.0), apart=True)


@pytest.mark.parametrize("cache_latents", [True, False])
def test_each_data_set_is_encoded_and_cached_at_its_own_size(
    cache_latents: bool, model: BaseModel, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"resolution": (16, 24, 32, 16), "cache_latents": cache_latents}
    dataset, config = MixedSizes(), TrainingConfig(output_dir=str(tmp_path), **options)
    plans = list(islice(plan_batches(COUNT, BATCH_SIZE, 0, mixture=dataset.mixture), 6))
    for _ in range(2):  # The second encoder finds everything in the cache.
        encoder = BatchEncoder(model, config)
        for plan in plans:
            batch = encoder.encode(plan, encoder.load(dataset, plan))
            height, width = [(16, 24), (32, 16)][plan.part]
            pixels = torch.stack(
                [preprocess(dataset[i]["image"], Size(height, width), True, False) for i in plan.index]
            )
            expected = torch.cat([model.encode_images(each[None])["mean"] for each in pixels])
            assert batch["mean"].shape == (len(plan.index), 4, height // 2, width // 2)
            assert torch.equal(batch["mean"], expected)
    cached = list((tmp_path / "cache").glob("*/*.safetensors"))
    latents = [tensors["mean"].shape for path in cached if "mean" in (tensors := load_file(path))]
    assert sorted(latents) == ([(4, 8, 12)] * 2 + [(4, 16, 8)] * 3 if cache_latents else [])
    empty = next(plan_batches(COUNT, 1, 0, rank=1, world_size=2, mixture=dataset.mixture))
    height, width = [(8, 12), (16, 8)][empty.part]
    assert encoder.encode(empty, encoder.load(dataset, empty))["latents"].shape == (0, 4, height, width)


def test_square_has_the_same_cache_entry_however_it_is_stated(tmp_path: Path) -> None:
    keys = [
        cache_module.LatentCache(tmp_path, model="vae", resolution=resolution, center_crop=True).key(
            cache_module.ImageIdentity("key", "a"), flip=False
        )
        for resolution in (16, Size(16, 16), Size(16, 24), Size(24, 16))
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3
