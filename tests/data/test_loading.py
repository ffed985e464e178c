"""Batches read from data sets: the same for any number of processes and threads, and a refusal for unusable samples."""

import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.images import preprocess
from d2f_fast.data.loading import augmented_pixels, check_dataset, load_ahead, read_sample
from d2f_fast.data.order import Augmentation, BatchPlan, batch_indices, plan_batches, sample_augmentation
from d2f_fast.errors import DatasetError

SHAPES = [(16, 16), (16, 23), (31, 16), (40, 57), (9, 12)]


class Images:
    """Images of several sizes in memory, which note the indices and threads that read them."""

    def __init__(self, count: int = 11) -> None:
        generator = np.random.default_rng(3)
        shapes = itertools.islice(itertools.cycle(SHAPES), count)
        self.images = [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
        self.read: list[int] = []
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        self.read.append(index)
        self.threads.add(threading.get_ident())
        text = f"picture {index}" if index % 2 else [f"{style} {index}" for style in ("one", "two", "three")]
        return {"image": self.images[index], "text": text}


def load_sample(dataset: Any, index: int, augmentation: Augmentation, resolution: int, **options: Any) -> Any:
    """Pixels and caption of one sample."""
    sample = read_sample(dataset, index)
    pixels = augmented_pixels(sample, augmentation, resolution, **options)
    return pixels, sample.captions.choose(augmentation.caption)


def batches(
    dataset: Any,
    batch_size: int,
    resolution: int,
    seed: int,
    start_step: int = 0,
    *,
    random_flip: bool,
    center_crop: bool,
    workers: int = 0,
    **process: int,
) -> Iterator[dict[str, Any]]:
    """Batches of pixels and captions, as a trainer without caches reads them."""
    options = {"random_flip": random_flip, "center_crop": center_crop}

    def load(plan: BatchPlan) -> list[tuple[torch.Tensor, str]]:
        pairs = zip(plan.index, plan.augmentations, strict=True)
        return [load_sample(dataset, index, augmentation, resolution, **options) for index, augmentation in pairs]

    plans = plan_batches(len(dataset), batch_size, seed, start_step, **process)
    for plan, samples in load_ahead(plans, load, workers):
        yield {
            "pixel_values": torch.stack([p for p, _ in samples])
            if samples
            else torch.empty(0, 3, resolution, resolution),
            "text": [caption for _, caption in samples],
            "epoch": plan.epoch,
            "index": plan.index,
            "flip": [random_flip and each.mirrored for each in plan.augmentations],
            "global_batch_size": plan.global_batch_size,
            "offset": plan.offset,
        }


def run(dataset: Any, start_step: int, steps: int, **options: Any) -> list[dict[str, Any]]:
    settings = {"batch_size": 4, "resolution": 16, "seed": 7, "random_flip": True, "center_crop": False, **options}
    generator = batches(dataset, start_step=start_step, **settings)
    result = [dict(batch) for batch in itertools.islice(generator, steps)]
    generator.close()
    return result


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.pop("pixel_values"), b.pop("pixel_values"))
        assert a == b


@pytest.mark.parametrize("start_step", [1, 2, 10])
def test_restart_at_any_step_continues_bit_for_bit(start_step):
    dataset = Images()  # 3 steps an epoch: the restarts are in the middle of an epoch and at its end
    straight = run(dataset, 0, 20)
    assert {batch["epoch"] for batch in straight} == set(range(7))
    assert_same(run(dataset, 0, start_step) + run(dataset, start_step, 20 - start_step), straight)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_slices_of_any_number_of_processes_are_the_same_global_batch(world_size):
    dataset = Images()
    whole = run(dataset, 0, 7)
    slices = [run(dataset, 0, 7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [one[step] for one in slices]
        sizes = [len(part["index"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [part["offset"] for part in parts] == [sum(sizes[:rank]) for rank in range(world_size)]
        assert {part["global_batch_size"] for part in parts} == {len(batch["index"])}
        for name in ("index", "flip", "text"):
            assert [value for part in parts for value in part[name]] == batch[name]
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])


def test_slice_is_empty_only_where_the_global_batch_is_smaller_than_the_world():
    slices = [run(Images(9), 0, 3, rank=rank, world_size=4) for rank in range(4)]
    assert [[len(batch["index"]) for batch in one] for one in slices] == [
        [1, 1, 1],
        [1, 1, 0],
        [1, 1, 0],
        [1, 1, 0],
    ]
    empty = slices[3][2]
    assert empty["pixel_values"].shape == (0, 3, 16, 16)
    assert (empty["text"], empty["flip"], empty["global_batch_size"], empty["offset"]) == ([], [], 1, 1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_loading_ahead_in_threads_changes_no_bit(world_size):
    dataset, threaded = Images(), Images()
    straight = run(dataset, 2, 12, world_size=world_size)
    assert_same(run(threaded, 2, 12, world_size=world_size, workers=3), straight)
    assert dataset.threads == {threading.get_ident()}
    assert threading.get_ident() not in threaded.threads


def test_loading_ahead_is_bounded_and_stops_with_the_generator():
    dataset = Images(1000)
    before = threading.active_count()
    generator = batches(dataset, 4, 16, 0, random_flip=False, center_crop=True, workers=2)
    next(generator)
    generator.close()
    assert threading.active_count() == before
    assert 4 <= len(dataset.read) <= 16  # the batch, and one for each thread that may have begun another


def test_pixels_flips_and_captions_follow_the_augmentation():
    dataset = Images()
    for step, batch in enumerate(run(dataset, 0, 9)):
        epoch, indices = batch_indices(11, 4, 7, step)
        assert (batch["epoch"], batch["index"]) == (epoch, indices)
        for row, index in enumerate(indices):
            augmentation = sample_augmentation(7, epoch, index)
            assert batch["flip"][row] == (augmentation.flip < 0.5)
            expected = preprocess(dataset.images[index], 16, False, augmentation.flip < 0.5, augmentation.crop)
            assert torch.equal(batch["pixel_values"][row], expected)
            style = ("one", "two", "three")[int(augmentation.caption * 3)]
            assert batch["text"][row] == (f"picture {index}" if index % 2 else f"{style} {index}")


def test_without_augmentation_each_epoch_shows_the_same_pixels():
    seen: dict[int, torch.Tensor] = {}
    for batch in run(Images(), 0, 9, random_flip=False, center_crop=True):
        assert batch["flip"] == [False] * len(batch["index"])
        for index, pixels in zip(batch["index"], batch["pixel_values"], strict=True):
            assert torch.equal(seen.setdefault(index, pixels), pixels)
    assert sorted(seen) == list(range(11))


def test_plans_describe_the_batches_without_reading_an_image():
    plans: Iterator[BatchPlan] = plan_batches(11, 4, 7, 1, rank=1, world_size=2)
    dataset = Images()
    for plan, batch in zip(plans, run(dataset, 1, 6, rank=1, world_size=2), strict=False):
        described = (plan.epoch, plan.index, plan.global_batch_size, plan.offset)
        assert described == (batch["epoch"], batch["index"], batch["global_batch_size"], batch["offset"])
        assert [each.mirrored for each in plan.augmentations] == batch["flip"]
        for row, (index, augmentation) in enumerate(zip(plan.index, plan.augmentations, strict=True)):
            pixels, caption = load_sample(dataset, index, augmentation, 16, random_flip=True, center_crop=False)
            assert torch.equal(pixels, batch["pixel_values"][row])
            assert caption == batch["text"][row]


def test_folder_gives_the_same_batches_as_images_in_memory(tmp_path):
    for index, image in enumerate(Images(5).images):
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    in_memory = Images(5)
    from_disk = run(CaptionedImages(tmp_path), 0, 4, workers=2)
    for batch, expected in zip(from_disk, run(in_memory, 0, 4), strict=True):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert batch["text"] == [f"picture {index}" for index in batch["index"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_does_not_decode_is_refused_when_it_is_due(tmp_path, workers):
    for index in range(6):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a square")
    broken = batch_indices(6, 2, 0, 1)[1][0]
    (tmp_path / f"{broken}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    generator = batches(CaptionedImages(tmp_path), 2, 16, 0, random_flip=False, center_crop=True, workers=workers)
    assert next(generator)["index"] == batch_indices(6, 2, 0, 0)[1]
    with pytest.raises(DatasetError, match=rf"/{broken}\.png does not decode as PNG, JPEG, WEBP, BMP"):
        next(generator)


SQUARE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        ({"image": SQUARE}, 'sample 0: "text" is missing or empty: give each image a caption'),
        ({"image": SQUARE, "text": ["", ""]}, 'sample 0: "text" is missing or empty'),
        ({"image": SQUARE, "text": 3}, 'sample 0: "text" is not text: give each image a caption'),
        ({"image": SQUARE, "text": "x" * 10_001}, 'sample 0: "text" is a caption of more than 10000 characters'),
        ({"text": "a cat"}, 'sample 0: "image" must be a PIL image, got NoneType'),
        ({"image": b"png", "text": "a cat"}, 'sample 0: "image" must be a PIL image, got bytes'),
        ({"image": Image.new("F", (8, 8)), "text": "a cat"}, "sample 0: floating-point images have no defined white"),
        (
            {"image": Image.new("RGB", (9000, 1)), "text": "a cat", "path": "a.png"},
            "a.png: 9000x1 pixels are too elong",
        ),
    ],
)
def test_unusable_sample_is_refused_by_name(sample, sentence):
    with pytest.raises(DatasetError, match=sentence):
        next(batches([sample], 1, 256, 0, random_flip=False, center_crop=True))


@pytest.mark.parametrize("error", [AssertionError("a"), IndexError("a"), OSError("a")], ids=lambda e: type(e).__name__)
def test_every_exception_of_a_data_set_names_the_sample(error):
    class Broken(Images):
        def __getitem__(self, index: int) -> Mapping[str, Any]:
            raise error

    with pytest.raises(DatasetError, match=rf"^sample 3 cannot be used \({type(error).__name__}: a\): replace it$"):
        read_sample(Broken(), 3)


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ([], "the dataset is empty: give at least one captioned image"),
        (iter([1]), "a dataset needs a length and items by index, and list_iterator has not: give a list"),
        ({1, 2}, "a dataset needs a length and items by index, and set has not"),
        ({"train": [1], "test": [2]}, r"is a dictionary of splits: give one of them, such as dataset\['train'\]$"),
    ],
)
def test_unusable_dataset_is_refused(dataset, sentence):
    with pytest.raises(DatasetError, match=sentence):
        check_dataset(dataset)
