"""Batches of source and target images: their latents, the cache, and images that are refused."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from d2f_fast.config import TrainingConfig
from d2f_fast.data.batch import check_batch
from d2f_fast.data.images import preprocess, read_image, to_rgb
from d2f_fast.data.order import Augmentation, BatchPlan, plan_batches
from d2f_fast.data.source_encoding import SourceTargetEncoder
from d2f_fast.data.source_images import SourceTargetDataset, SourceTargetFolder
from d2f_fast.data.source_options import SourceOptions
from d2f_fast.errors import DatasetError
from d2f_fast.models.base_model import BaseModel


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> BaseModel:
    return BaseModel.load(tiny_folder)


@pytest.fixture
def encoder(model: BaseModel, tmp_path: Path) -> Callable[..., SourceTargetEncoder]:
    """Return a function that makes the encoder of a folder."""

    def make(folder: Path, source_noise: float = 0.0, **options: Any) -> SourceTargetEncoder:
        config = TrainingConfig(output_dir=str(tmp_path), resolution=16, **options)
        dataset = SourceTargetDataset(SourceTargetFolder(folder), SourceOptions(source_noise))
        return SourceTargetEncoder(model, config, dataset)

    return make


def batches(encoder: SourceTargetEncoder, steps: int = 2) -> list[Any]:
    plans = islice(plan_batches(4, 2, 0), steps)
    return [(plan, encoder.encode(plan, encoder.load(plan))) for plan in plans]


def test_batch_holds_the_posterior_of_the_target_and_the_mean_of_the_source(
    model: BaseModel, encoder: Any, source_targets: Path
) -> None:
    ((plan, batch),) = batches(encoder(source_targets, 0.25, random_flip=True), 1)
    check_batch(batch)
    assert batch["source_noise"] == 0.25 and batch["source"].shape == batch["mean"].shape == (2, 4, 8, 8)
    for row, (index, augmentation) in enumerate(zip(plan.index, plan.augmentations, strict=True)):
        posteriors = []
        for name in (f"source/{index}.jpg", f"target/{index}.png"):
            image = to_rgb(read_image(source_targets / name))
            pixels = preprocess(image, 16, center_crop=True, flip=augmentation.mirrored)
            with torch.no_grad():
                posteriors.append(model.vae.encode(pixels[None]).latent_dist)
        assert torch.equal(batch["source"][row], posteriors[0].mode()[0] * model.vae.config.scaling_factor)
        assert torch.equal(batch["mean"][row], posteriors[1].mean[0])
        assert torch.equal(batch["std"][row], posteriors[1].std[0])
    assert torch.equal(batch["encoder_hidden_states"][1], model.encode_prompts([""])["encoder_hidden_states"][0])


def test_cache_gives_the_same_batches_without_reading_the_images(
    encoder: Any, source_targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = batches(encoder(source_targets))
    uncached = batches(encoder(source_targets, cache_latents=False))
    monkeypatch.setattr(SourceTargetEncoder, "_pixels", lambda *_: pytest.fail("a cached image was read"))
    again = batches(encoder(source_targets))
    for (_, a), (_, b), (_, c) in zip(first, again, uncached, strict=True):
        for name in ("source", "mean", "std", "encoder_hidden_states"):
            assert torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]), name


def test_each_folder_may_have_a_size_of_its_own(model: BaseModel, source_targets: Path, tmp_path: Path) -> None:
    dataset = SourceTargetDataset([SourceTargetFolder(source_targets)] * 2)
    encoder = SourceTargetEncoder(model, TrainingConfig(str(tmp_path), resolution=(16, 16, 16, 24)), dataset)
    for part, width in ((0, 8), (1, 12)):
        for index in ([4 * part], []):
            plan = BatchPlan(0, index, [Augmentation(1.0, (0.5, 0.5), 0.0)] * len(index), 1, 0, part)
            batch = encoder.encode(plan, encoder.load(plan))
            assert batch["source"].shape == (len(index), 4, 8, width)


def test_process_without_a_sample_gets_an_empty_batch(encoder: Any, source_targets: Path) -> None:
    made = encoder(source_targets)
    plan = BatchPlan(0, [], [], 1, 1)
    batch = made.encode(plan, made.load(plan))
    check_batch(batch)
    assert batch["source"].shape == batch["latents"].shape == (0, 4, 8, 8)


def test_images_of_different_sizes_and_damaged_ones_are_refused(encoder: Any, tmp_path: Path) -> None:
    for name, size in (("source", (8, 8)), ("target", (16, 16))):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", size).save(tmp_path / "data" / name / "a.png")
    plan = next(plan_batches(1, 1, 0))
    with pytest.raises(DatasetError, match=r"source/a\.png has 8x8 pixels and .*target/a\.png 16x16: give both in the"):
        encoder(tmp_path / "data").load(plan)
    (tmp_path / "data/source/a.png").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"source/a\.png does not decode"):
        encoder(tmp_path / "data").load(plan)
