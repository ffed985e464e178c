"""Batches of images with depth: their latents, the cache, and the options of the run."""

import dataclasses
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import check_batch
from d2f_fast.data.depth_data import find_depth_images
from d2f_fast.data.depth_encoding import DepthDataset, DepthEncoder, options_for_depth
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.depth_pixels import depth_pixels
from d2f_fast.data.order import BatchPlan, plan_batches, sample_augmentation
from d2f_fast.models.base_model import BaseModel


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> BaseModel:
    model = BaseModel.load(tiny_folder)
    model.see_images()
    return model


@pytest.fixture
def batches(model: BaseModel, tmp_path: Path) -> Callable[..., list[Any]]:
    """Return a function that makes the first batches of a folder."""

    def make(folder: Path, steps: int = 2, normalization: Any = "affine", **options: Any) -> list[Any]:
        config = TrainingConfig(output_dir=str(tmp_path), resolution=16, **options)
        depth_options = DepthOptions(depth_normalization=normalization)
        dataset = DepthDataset(find_depth_images(folder, depth_options), depth_options)
        encoder = DepthEncoder(model, config, dataset)
        plans = islice(plan_batches(len(dataset), 4, 0), steps)
        return [(plan, encoder.encode(plan, encoder.load(plan))) for plan in plans]

    return make


def test_batch_holds_the_latents_of_image_and_depth(model: BaseModel, batches: Any, depth_rooms: Path) -> None:
    (plan, batch), _ = batches(depth_rooms, normalization="log")
    check_batch(batch)
    assert batch["latents"].shape == batch["context"].shape == (4, 4, 8, 8) and batch["mask"].shape == (4, 1, 8, 8)
    item = find_depth_images(depth_rooms, DepthOptions())[plan.index[2]]
    pixels = depth_pixels(item, plan.augmentations[2], 16, 2, "log", random_flip=False, center_crop=True)
    for name, image in (("context", pixels.image), ("latents", pixels.depth)):
        with torch.no_grad():
            expected = model.vae.encode(image[None]).latent_dist.mode()[0] * model.vae.config.scaling_factor
        assert torch.equal(batch[name][2], expected)
    assert torch.equal(batch["mask"][2], pixels.mask)
    tokens = model.pipeline.tokenizer("", padding="do_not_pad", return_tensors="pt").input_ids
    assert tokens.shape == (1, 2)
    assert torch.equal(batch["encoder_hidden_states"][0], model.pipeline.text_encoder(tokens)[0][0])


def test_cache_gives_the_same_batches_without_reading_the_files(
    batches: Any, depth_rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"random_flip": True, "cache_dir": str(tmp_path / "cache")}
    first = batches(depth_rooms, **options)
    uncached = batches(depth_rooms, cache_latents=False, random_flip=True)
    monkeypatch.setattr(DepthDataset, "__getitem__", lambda *_: pytest.fail("a cached image was read"))
    again = batches(depth_rooms, **options)
    for (_, a), (_, b), (_, c) in zip(first, again, uncached, strict=True):
        assert all(
            torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in ("latents", "context", "mask")
        )


def test_cache_tells_normalisations_and_changed_depth_apart(batches: Any, depth_rooms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(depth_rooms, tmp_path / "rooms"))
    ((plan, first),) = batches(folder, 1)
    ((_, other),) = batches(folder, 1, "disparity")
    assert not torch.equal(first["latents"], other["latents"]) and torch.equal(first["context"], other["context"])
    changed = sorted((folder / "depth").glob("*.npy"))[plan.index[0]]
    np.save(changed, np.load(changed)[::-1].copy())
    ((_, after),) = batches(folder, 1)
    assert not torch.equal(after["latents"][0], first["latents"][0])
    assert torch.equal(after["latents"][1:], first["latents"][1:])


def test_mixed_sources_keep_their_own_range_in_the_batch_and_in_the_cache(
    model: BaseModel, depth_rooms: Path, tmp_path: Path
) -> None:
    near = DepthOptions(depth_max=3.0)
    sources = [find_depth_images(depth_rooms, options) for options in (DepthOptions(), near)]
    mixed = DepthDataset(sources, weights=(2.0, 1.0))
    assert mixed.mixture is not None and mixed.mixture.counts == (8, 4) and len(mixed) == 12
    config = TrainingConfig(output_dir=str(tmp_path), resolution=16)
    for _ in range(2):  # The second time, both come from the cache.
        encoder = DepthEncoder(model, config, mixed)
        plan = BatchPlan(0, [1, 7], [sample_augmentation(0, 0, 0)] * 2, 2, 0)
        batch = encoder.encode(plan, encoder.load(plan))
        for row, source in enumerate(sources):
            alone = DepthEncoder(model, dataclasses.replace(config, cache_latents=False), DepthDataset(source))
            single = BatchPlan(0, [1], plan.augmentations[:1], 1, 0)
            expected = alone.encode(single, alone.load(single))
            assert all(torch.equal(batch[name][row], expected[name][0]) for name in ("latents", "context", "mask"))
    assert batch["mask"][1].sum() < batch["mask"][0].sum()
    assert mixed.settings()["most"] == "inf, 3.0" and set(mixed.invalid) == {1, 7}


def test_share_of_invalid_pixels_is_counted(depth_rooms: Path) -> None:
    dataset = DepthDataset(find_depth_images(depth_rooms, DepthOptions()))
    for index in range(len(dataset)):
        assert dataset.invalid.get(index) is None
        assert dataset[index].valid.mean() == pytest.approx(1 - dataset.invalid[index])
    assert sum(dataset.invalid.values()) > 0


def test_empty_slice_has_a_context_of_its_shape(model: BaseModel, tmp_path: Path, depth_rooms: Path) -> None:
    config = TrainingConfig(output_dir=str(tmp_path), resolution=16)
    dataset, plan = DepthDataset(find_depth_images(depth_rooms, DepthOptions())), BatchPlan(0, [], [], 1, 1)
    for distill in (False, True):
        encoder = DepthEncoder(model, dataclasses.replace(config, distill=distill), dataset)
        batch = encoder.encode(plan, encoder.load(plan))
        check_batch(batch)
        assert batch["context"].shape == (0, 4, 8, 8) and batch["mask"].shape == (0, 1, 8, 8)
        assert ("noise" in batch) is distill


def test_single_jump_starts_from_zeros_in_place_of_noise(batches: Any, depth_rooms: Path) -> None:
    (_, plain), (_, jump) = (batches(depth_rooms, 1, distill=distill)[0] for distill in (False, True))
    check_batch(jump)
    assert torch.equal(jump.pop("noise"), torch.zeros(4, 4, 8, 8)) and "noise" not in plain
    assert jump.keys() == plain.keys() and torch.equal(jump["latents"], plain["latents"])


def test_new_lora_trains_the_first_layer_and_uses_the_empty_prompt_alone() -> None:
    settled = options_for_depth(TrainingConfig())
    assert (settled.first_last_layers, settled.caption_dropout) == (True, 0.0)
    assert options_for_depth(TrainingConfig(first_last_layers=False)).first_last_layers is False
    assert options_for_depth(TrainingConfig(init_lora="a")).first_last_layers is None
    assert options_for_depth(TrainingConfig(adapter="full")).first_last_layers is None
