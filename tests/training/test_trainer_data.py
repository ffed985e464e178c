"""Runs over datasets: cached or not, read by threads or not, and with samples that cannot be used."""

import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.data import cache
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.order import Mixture, batch_indices
from d2f_fast.errors import CheckpointError, DatasetError, RefusedInputError
from d2f_fast.training.checkpoint import find_checkpoint, verify_checkpoint


def test_half_filled_cache_gives_the_same_bits(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any
) -> None:
    first = make_trainer("first")
    first.fit(images())
    files = sorted(Path(first.config.output_dir).glob("cache/*/*.safetensors"))
    assert len(files) > 10
    for file in files[::2]:
        file.unlink()
    second = make_trainer("second", cache_dir=str(Path(first.config.output_dir) / "cache"))
    second.fit(images())
    assert_equal(state_of(second), state_of(first))


def test_second_run_over_the_same_images_encodes_nothing(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_trainer("first", random_flip=True, cache_dir=str(Path(make_trainer().config.output_dir) / "cache"))
    first.fit(images())
    second = make_trainer("second", random_flip=True, cache_dir=first.config.cache_dir)
    second._inputs.empty_condition()
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(second.model, name, lambda *arguments: pytest.fail("the cache was not used"))
    second.fit(images())
    assert_equal(state_of(second), state_of(first))


def test_image_folder_trains_as_the_same_images_in_memory(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(5):
        images()[index]["image"].save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text("abcde"[index])

    def in_memory_images() -> Any:
        return images(5, change=lambda index, item: item | {"text": "abcde"[index]})

    options = {"random_flip": True, "train_batch_size": 5}  # each image in each epoch, mirrored or not
    from_folder, in_memory = make_trainer("folder", **options), make_trainer("memory", **options)
    uncached = make_trainer("uncached", cache_latents=False, **options)
    from_folder.fit(CaptionedImages(tmp_path / "images"))
    in_memory.fit(in_memory_images())
    uncached.fit(in_memory_images())
    assert_equal(state_of(from_folder), state_of(in_memory))
    assert_equal(state_of(uncached), state_of(in_memory))


def test_cache_that_cannot_be_written_is_not_reported_as_a_sample(
    images: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(hashes: Any, path: Path) -> str:
        raise RefusedInputError("cannot write the cache")

    monkeypatch.setattr(cache.FileHashes, "__call__", full)
    (tmp_path / "images").mkdir()
    images()[0]["image"].save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "0.txt").write_text("a")
    with pytest.raises(RefusedInputError, match=r"^cannot write the cache$") as caught:
        make_trainer().fit(CaptionedImages(tmp_path / "images"))
    assert not isinstance(caught.value, DatasetError)


def note_thread(threads: set[int], index: int, item: dict[str, Any]) -> dict[str, Any]:
    """Note the thread that reads an item."""
    threads.add(threading.get_ident())
    return item


@pytest.mark.parametrize("cache_latents", [True, False])
def test_threads_read_ahead_and_change_no_bit(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, cache_latents: bool
) -> None:
    states = []
    for workers in (0, 1, 3):
        threads = set[int]()
        trainer = make_trainer(f"{workers}", cache_latents=cache_latents, dataloader_num_workers=workers)
        trainer.fit(images(change=partial(note_thread, threads)))
        states.append(state_of(trainer))
        assert (threading.get_ident() in threads) == (workers == 0)
    assert_equal(states[1], states[0])
    assert_equal(states[2], states[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_sample_stops_the_run_after_a_checkpoint(images: Any, make_trainer: Any, workers: int) -> None:
    options = {"checkpointing_steps": 0, "dataloader_num_workers": workers}
    epoch, trainer = (
        [index for step in range(2) for index in batch_indices(len(images()), 4, 0, step)[1]],
        make_trainer(**options),
    )
    sentence = f'sample {epoch[-1]}: "image" must be a PIL image, got NoneType; step 1 is saved'
    with pytest.raises(DatasetError, match=re.escape(sentence)):
        trainer.fit(images(change=lambda index, item: item | ({"image": None} if index == epoch[-1] else {})))
    found = find_checkpoint(trainer.config.output_dir, "latest")
    assert found is not None and verify_checkpoint(found) == 1
    first = make_trainer("first")
    with pytest.raises(DatasetError, match=r"got NoneType$"):
        first.fit(images(change=lambda index, item: item | ({"image": None} if index == epoch[0] else {})))
    assert find_checkpoint(first.config.output_dir, "latest") is None


@pytest.mark.parametrize("error", [KeyError("a"), OSError(28, "No space left on device")], ids=["defect", "full disk"])
def test_run_is_saved_whatever_stops_its_batches(images: Any, make_trainer: Any, error: Exception) -> None:
    trainer = make_trainer(checkpointing_steps=0)
    encode = trainer.model.encode_images

    def fail(pixels: Any) -> Any:
        if trainer.global_step == 2:
            raise error
        return encode(pixels)

    trainer.model.encode_images = fail
    with pytest.raises(type(error)) as caught:
        trainer.fit(images())
    assert caught.value.__notes__ == ["d2f: step 2 is saved"]
    found = find_checkpoint(trainer.config.output_dir, "latest")
    assert found is not None and verify_checkpoint(found) == 2


@pytest.mark.parametrize("where", ["loss", "update"])
def test_step_that_fails_keeps_the_steps_before_it(images: Any, make_trainer: Any, where: str) -> None:
    trainer = make_trainer(checkpointing_steps=0)
    part = {"loss": trainer._training_step, "update": trainer.optimizer}[where]
    name = {"loss": "loss", "update": "step"}[where]
    compute = getattr(part, name)

    def fail(*arguments: Any) -> Any:
        if trainer.global_step == 2:
            raise torch.OutOfMemoryError("out of memory")
        return compute(*arguments)

    setattr(part, name, fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.fit(images())
    found = find_checkpoint(trainer.config.output_dir, "latest")
    if where == "update":  # the weights may be those of half a step
        assert found is None
    else:
        assert caught.value.__notes__ == ["d2f: step 2 is saved"]
        assert found is not None and verify_checkpoint(found) == 2


@pytest.mark.parametrize("cache_latents", [True, False])
@pytest.mark.parametrize(("change", "sentence"), [
    ({"text": ""}, r'sample \d: "text"'),
    ({"text": None}, r'sample \d: "text"'),
    ({"image": "a.png"}, r'sample \d: "image" must be a PIL image, got str'),
])  # fmt: skip
def test_unusable_sample_is_refused(
    images: Any, make_trainer: Any, cache_latents: bool, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DatasetError, match=sentence):
        make_trainer(cache_latents=cache_latents).fit(images(change=lambda index, item: item | change))


SIZES = {"resolution": (16, 24, 32, 16), "train_batch_size": 2, "random_flip": True, "max_train_steps": 6}


def two_sizes(images: Any) -> Any:
    """Return three images of one data set and four of another one."""
    dataset = images(7)
    dataset.mixture = Mixture((3, 4), (1.0, 1.0))
    return dataset


def test_run_over_data_sets_of_two_sizes_resumes_bit_for_bit(
    images: Any, state_of: Any, assert_equal: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make_trainer("straight", **SIZES)
    step, shapes = straight.step, []
    monkeypatch.setattr(straight, "step", lambda batch: (shapes.append(batch["mean"].shape), step(batch))[1])
    straight.fit(two_sizes(images))
    # Four of seven samples are of the first data set: two batches of an epoch; the other three are two more.
    assert sorted(shapes[:4]) == [(1, 4, 16, 8), (2, 4, 8, 12), (2, 4, 8, 12), (2, 4, 16, 8)]
    make_trainer("resumed", **SIZES | {"max_train_steps": 3}).fit(two_sizes(images))
    resumed = make_trainer("resumed", **SIZES, resume_from_checkpoint="latest")
    resumed.fit(two_sizes(images))
    assert_equal(state_of(resumed), state_of(straight))
    (image,) = resumed.sample("ab", 1)
    assert image.size == (24, 16)  # width and height of the first data set
    changed = make_trainer("resumed", **SIZES | {"resolution": 16}, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match=r"resolution was \[16, 24, 32, 16\] and is now 16: resume with"):
        changed.fit(two_sizes(images))


def test_sizes_of_another_number_of_data_sets_are_refused(images: Any, make_trainer: Any) -> None:
    with pytest.raises(
        RefusedInputError, match="resolution: 4 numbers for 1 data set: give one number for a square, or"
    ):
        make_trainer(**SIZES).fit(images(7))
    with pytest.raises(
        RefusedInputError, match="resolution: 2 numbers for 2 data sets: give one number for squares of"
    ):
        make_trainer(resolution=(16, 24)).fit(two_sizes(images))
