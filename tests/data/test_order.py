"""Order, augmentation, preprocessing and batches: exact at any step, for any number of processes and workers."""

import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.data.captions import choose_caption
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.images import preprocess
from d2f_fast.data.loading import check_dataset, load_ahead, load_sample
from d2f_fast.data.order import (
    BatchPlan,
    Draws,
    augmentation,
    batch_indices,
    iterate_indices,
    plan_batches,
    steps_per_epoch,
)
from d2f_fast.errors import DatasetError

MASK = 2**64 - 1
SHAPES = [(16, 16), (16, 23), (31, 16), (40, 57), (9, 12)]


def philox_words(key: tuple[int, int], counter: list[int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) as numpy runs it: the counter is incremented before each block."""
    words: list[int] = []
    while len(words) < count:
        counter = [(counter[0] + 1) & MASK, *counter[1:]]
        block, k0, k1 = list(counter), *key
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * block[0], 0xCA5A826395121157 * block[2]
            block = [(high >> 64) ^ block[1] ^ k0, high & MASK, (low >> 64) ^ block[3] ^ k1, low & MASK]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        words += block
    return words[:count]


class Pictures:
    """Pictures of several sizes in memory; each remembers the threads that read it."""

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
        pairs = zip(plan.index, plan.draws, strict=True)
        return [load_sample(dataset, index, draws, resolution, **options) for index, draws in pairs]

    plans = plan_batches(len(dataset), batch_size, seed, start_step, **process)
    for plan, samples in load_ahead(plans, load, workers):
        yield {
            "pixel_values": torch.stack([p for p, _ in samples])
            if samples
            else torch.empty(0, 3, resolution, resolution),
            "text": [caption for _, caption in samples],
            "epoch": plan.epoch,
            "index": plan.index,
            "flip": [random_flip and draws.mirrored for draws in plan.draws],
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


# Order.


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_order_is_the_argsort_of_philox_words(seed):
    for epoch in (0, 1, 5):
        words = philox_words((seed, 0), [0, 0, epoch, 0], 13)
        expected = sorted(range(13), key=words.__getitem__)
        assert batch_indices(13, 13, seed, epoch) == (epoch, expected)


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (12, 4), (1, 4), (7, 1), (5, 64)])
def test_each_epoch_holds_every_sample_once_and_keeps_its_last_batch(length, batch_size):
    steps = steps_per_epoch(length, batch_size)
    assert steps == int(np.ceil(length / batch_size))
    stream = list(itertools.islice(iterate_indices(length, batch_size, 3), 3 * steps))
    for epoch in range(3):
        of_epoch = stream[epoch * steps : (epoch + 1) * steps]
        assert [number for number, _ in of_epoch] == [epoch] * steps
        assert sorted(index for _, indices in of_epoch for index in indices) == list(range(length))
        assert all(len(indices) == batch_size for _, indices in of_epoch[:-1])


def test_a_step_looked_up_alone_is_the_step_of_the_stream():
    stream = itertools.islice(iterate_indices(10, 4, 3), 12)
    assert [batch_indices(10, 4, 3, step) for step in range(12)] == list(stream)
    assert list(itertools.islice(iterate_indices(10, 4, 3, 5), 7)) == [
        batch_indices(10, 4, 3, step) for step in range(5, 12)
    ]


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_batch_size():
    assert len({tuple(batch_indices(50, 50, seed, epoch)[1]) for seed in range(3) for epoch in range(3)}) == 9
    joined = [index for _, indices in itertools.islice(iterate_indices(50, 7, 1), 8) for index in indices]
    assert joined == batch_indices(50, 50, 1, 0)[1]


def test_the_stream_sorts_once_an_epoch(monkeypatch):
    sorts = []
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *args, **kwargs: sorts.append(1) or argsort(*args, **kwargs))
    list(itertools.islice(iterate_indices(100, 10, 0), 30))
    assert len(sorts) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 4, 0, 0), "length and batch_size must be at least 1, got 0 and 4"),
        ((4, 0, 0, 0), "length and batch_size must be at least 1, got 4 and 0"),
        ((4, 4, -1, 0), r"seed must be in \[0, 2\*\*64\), got -1"),
        ((4, 4, 2**64, 0), r"seed must be in \[0, 2\*\*64\)"),
        ((4, 4, 0, -1), "start_step must be at least 0, got -1"),
    ],
)
def test_impossible_orders_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        batch_indices(*arguments)


# Augmentation.


def test_draws_are_the_top_53_bits_of_one_philox_block():
    for seed, epoch, index in [(0, 0, 0), (7, 3, 1000), (2**63, 2**40, 2**33)]:
        words = philox_words((seed, 1), [0, index, epoch, 0], 4)
        flip, vertical, horizontal, caption = (word // 2**11 / 2**53 for word in words)
        assert augmentation(seed, epoch, index) == Draws(flip, (vertical, horizontal), caption)


def test_draws_are_uniform_and_uncorrelated():
    draws = [augmentation(0, epoch, index) for epoch in range(4) for index in range(1000)]
    values = np.array([[draw.flip, *draw.crop, draw.caption] for draw in draws])
    assert values.min() >= 0
    assert values.max() < 1
    # Five standard errors of a uniform variable's mean and variance, and of a correlation.
    assert np.abs(values.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 4000)
    assert np.abs(values.var(0) - 1 / 12).max() < 5 * np.sqrt(1 / 180 / 4000)
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 5 / np.sqrt(4000)
    assert [draw.mirrored for draw in draws] == (values[:, 0] < 0.5).tolist()


def test_the_caption_draw_reaches_each_alternative_and_no_further():
    assert choose_caption("only", 0.99) == "only"
    assert [choose_caption(["a", "b", "c"], draw) for draw in (0, 0.33, 0.34, 0.66, 0.67)] == ["a", "a", "b", "b", "c"]
    largest = 1 - 2**-53
    assert all(choose_caption(["x"] * (count - 1) + ["last"], largest) == "last" for count in range(1, 1000))


# Preprocessing.


def lanczos_weights(source: int, target: int) -> np.ndarray:
    """Antialiased Lanczos-3 as a matrix [target, source], from its definition."""
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * scale
    offsets = (np.arange(source)[None] + 0.5 - centres) / stretch
    weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def smooth_image(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + columns / 9), np.cos(rows / 7), np.sin(columns / 4)]
    return Image.fromarray((np.stack(waves, -1) * 90 + 128).astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_of_the_right_size_keeps_its_pixels(flip):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels[0, :2] = [[0, 0, 0], [255, 255, 255]]
    for center_crop in (False, True):
        result = preprocess(Image.fromarray(pixels), 16, center_crop, flip, (0.99, 0.99))
        expected = pixels[:, ::-1] if flip else pixels
        assert (result.dtype, result.shape, result.is_contiguous()) == (torch.float32, (3, 16, 16), True)
        np.testing.assert_array_equal(result.numpy(), expected.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    assert (result.min(), result.max()) == (-1, 1)


@pytest.mark.parametrize(("height", "width"), [(40, 57), (57, 40), (9, 12), (101, 33), (16, 40), (16, 19), (21, 16)])
def test_the_short_side_is_resized_with_lanczos_and_the_middle_cropped(height, width):
    image = smooth_image(height, width)
    result = preprocess(image, 16, True, False)
    short = min(height, width)
    rows, columns = int(16 * height / short), int(16 * width / short)  # torchvision's Resize
    resized = np.einsum(
        "rh,cw,hwk->krc", lanczos_weights(height, rows), lanczos_weights(width, columns), np.asarray(image, float)
    ).clip(0, 255)
    top, left = round((rows - 16) / 2), round((columns - 16) / 2)  # torchvision's CenterCrop
    expected = resized[:, top : top + 16, left : left + 16] / 127.5 - 1
    assert np.abs(result.numpy() - expected).max() < 1.5 / 127.5  # Pillow rounds to 8 bits after each direction


def test_the_crop_draw_reaches_every_position_and_the_flip_comes_after_it():
    columns = np.arange(20, dtype=np.uint8) * 12
    image = Image.fromarray(np.broadcast_to(columns[None, :, None], (16, 20, 3)).copy())
    for position in range(5):
        for draw in (position / 5 + 1e-9, (position + 1) / 5 - 1e-9):
            result = preprocess(image, 16, False, False, (0.7, draw))
            expected = columns[position : position + 16].astype(np.float32) / 127.5 - 1
            np.testing.assert_array_equal(result[0, 0].numpy(), expected)
            assert torch.equal(preprocess(image, 16, False, True, (0.7, draw)), result.flip(-1))
    upright = preprocess(image.transpose(Image.Transpose.TRANSPOSE), 16, False, False, (0.7, 0.0))
    np.testing.assert_array_equal(upright[0, :, 0].numpy(), columns[3:19].astype(np.float32) / 127.5 - 1)


def test_transparent_pixels_are_white_before_they_are_resized():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert torch.equal(preprocess(image, 16, True, False), torch.ones(3, 16, 16))


def test_an_image_too_elongated_to_resize_is_refused():
    with pytest.raises(ValueError, match="60000x1 pixels are too elongated for resolution 512: crop the image"):
        preprocess(Image.new("RGB", (60_000, 1)), 512, True, False)


# Batches.


@pytest.mark.parametrize("start_step", [1, 2, 10])
def test_a_restart_at_any_step_continues_bit_for_bit(start_step):
    dataset = Pictures()  # 3 steps an epoch: the restarts are in the middle of an epoch and at its end
    straight = run(dataset, 0, 20)
    assert {batch["epoch"] for batch in straight} == set(range(7))
    assert_same(run(dataset, 0, start_step) + run(dataset, start_step, 20 - start_step), straight)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_shares_of_any_number_of_processes_are_the_same_global_batch(world_size):
    dataset = Pictures()
    whole = run(dataset, 0, 7)
    shares = [run(dataset, 0, 7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        sizes = [len(part["index"]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert [part["offset"] for part in parts] == [sum(sizes[:rank]) for rank in range(world_size)]
        assert {part["global_batch_size"] for part in parts} == {len(batch["index"])}
        for name in ("index", "flip", "text"):
            assert [value for part in parts for value in part[name]] == batch[name]
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])


def test_a_share_is_empty_only_where_the_global_batch_is_smaller_than_the_world():
    shares = [run(Pictures(9), 0, 3, rank=rank, world_size=4) for rank in range(4)]
    assert [[len(batch["index"]) for batch in share] for share in shares] == [
        [1, 1, 1],
        [1, 1, 0],
        [1, 1, 0],
        [1, 1, 0],
    ]
    empty = shares[3][2]
    assert empty["pixel_values"].shape == (0, 3, 16, 16)
    assert (empty["text"], empty["flip"], empty["global_batch_size"], empty["offset"]) == ([], [], 1, 1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_threads_that_decode_ahead_change_no_bit(world_size):
    dataset, threaded = Pictures(), Pictures()
    straight = run(dataset, 2, 12, world_size=world_size)
    assert_same(run(threaded, 2, 12, world_size=world_size, workers=3), straight)
    assert dataset.threads == {threading.get_ident()}
    assert threading.get_ident() not in threaded.threads


def test_decoding_ahead_is_bounded_and_stops_with_the_generator():
    dataset = Pictures(1000)
    before = threading.active_count()
    generator = batches(dataset, 4, 16, 0, random_flip=False, center_crop=True, workers=2)
    next(generator)
    generator.close()
    assert threading.active_count() == before
    assert 4 <= len(dataset.read) <= 16  # the batch, and one for each thread that may have begun another


def test_pixels_flips_and_captions_of_a_batch_follow_the_draws_of_its_samples():
    dataset = Pictures()
    for step, batch in enumerate(run(dataset, 0, 9)):
        epoch, indices = batch_indices(11, 4, 7, step)
        assert (batch["epoch"], batch["index"]) == (epoch, indices)
        for row, index in enumerate(indices):
            draws = augmentation(7, epoch, index)
            assert batch["flip"][row] == (draws.flip < 0.5)
            expected = preprocess(dataset.images[index], 16, False, draws.flip < 0.5, draws.crop)
            assert torch.equal(batch["pixel_values"][row], expected)
            style = ("one", "two", "three")[int(draws.caption * 3)]
            assert batch["text"][row] == (f"picture {index}" if index % 2 else f"{style} {index}")


def test_without_augmentation_each_epoch_shows_the_same_pixels():
    seen: dict[int, torch.Tensor] = {}
    for batch in run(Pictures(), 0, 9, random_flip=False, center_crop=True):
        assert batch["flip"] == [False] * len(batch["index"])
        for index, pixels in zip(batch["index"], batch["pixel_values"], strict=True):
            assert torch.equal(seen.setdefault(index, pixels), pixels)
    assert sorted(seen) == list(range(11))


def test_plans_tell_the_batches_without_reading_an_image():
    plans: Iterator[BatchPlan] = plan_batches(11, 4, 7, 1, rank=1, world_size=2)
    dataset = Pictures()
    for plan, batch in zip(plans, run(dataset, 1, 6, rank=1, world_size=2), strict=False):
        told = (plan.epoch, plan.index, plan.global_batch_size, plan.offset)
        assert told == (batch["epoch"], batch["index"], batch["global_batch_size"], batch["offset"])
        assert [draws.mirrored for draws in plan.draws] == batch["flip"]
        for row, (index, draws) in enumerate(zip(plan.index, plan.draws, strict=True)):
            pixels, caption = load_sample(dataset, index, draws, 16, random_flip=True, center_crop=False)
            assert torch.equal(pixels, batch["pixel_values"][row])
            assert caption == batch["text"][row]


def test_a_folder_is_trained_on_from_disk(tmp_path):
    for index, image in enumerate(Pictures(5).images):
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    in_memory = Pictures(5)
    from_disk = run(CaptionedImages(tmp_path), 0, 4, workers=2)
    for batch, expected in zip(from_disk, run(in_memory, 0, 4), strict=True):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert batch["text"] == [f"picture {index}" for index in batch["index"]]


# Refusals.


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_refused_at_its_turn(tmp_path, workers):
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
def test_a_bad_sample_of_any_dataset_is_refused_by_name(sample, sentence):
    with pytest.raises(DatasetError, match=sentence):
        next(batches([sample], 1, 256, 0, random_flip=False, center_crop=True))


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ([], "the dataset is empty: give at least one captioned image"),
        (iter([1]), "a dataset needs a length and items by index, and list_iterator has not: give a list"),
        ({1, 2}, "a dataset needs a length and items by index, and set has not"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset, sentence):
    with pytest.raises(DatasetError, match=sentence):
        check_dataset(dataset)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\), got 2 of 2"),
    ],
)
def test_impossible_batches_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(Pictures(), 0, 1, **options)
