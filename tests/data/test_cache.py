"""Disk cache of encoded samples: what is computed again, damage of every kind, and processes killed while writing."""

import errno
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.data.cache import CacheKey, EmbeddingCache, LatentCache
from d2f_fast.errors import DatasetError, RefusedInputError

torch.set_num_threads(1)


def embedding(caption: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the pretended text encoder gives for one caption."""
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, generator=generator).to(dtype)
    return {"hidden": hidden, "mask": torch.tensor([True, False]), "length": torch.tensor(len(caption))}


class Encoder:
    """The pretended text encoder; it counts what it is asked for."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = captions
        self.calls: list[list[str]] = []

    def __call__(self, missing: list[int]) -> dict[str, Tensor]:
        self.calls.append([self.captions[position] for position in missing])
        rows = [embedding(self.captions[position]) for position in missing]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fill(cache: EmbeddingCache, captions: list[str]) -> list[list[str]]:
    """Ask for the captions, check every value, and return what had to be computed."""
    encoder = Encoder(captions)
    result = cache.get_or_compute([cache.key(caption) for caption in captions], encoder)
    for name in ("hidden", "mask", "length"):
        expected = torch.stack([embedding(caption, cache.dtype)[name] for caption in captions])
        assert result[name].dtype == expected.dtype
        assert torch.equal(result[name], expected)
    return encoder.calls


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.safetensors"))


def refuse_to_compute(missing: list[int]) -> dict[str, Tensor]:
    raise AssertionError(f"computed {missing} again")


def test_only_missing_samples_are_computed_and_in_one_call(tmp_path):
    cache = EmbeddingCache(tmp_path, model="clip")
    assert fill(cache, ["a", "b", "a"]) == [["a", "b"]]
    assert fill(cache, ["c", "b", "d", "a", "c"]) == [["c", "d"]]
    assert fill(EmbeddingCache(tmp_path, model="clip"), ["d", "c", "b", "a"]) == []
    assert cache.get_or_compute([], refuse_to_compute) == {}


def test_each_sample_has_a_file_named_by_its_key(tmp_path):
    cache = EmbeddingCache(tmp_path, model="clip")
    captions = [str(number) for number in range(40)]
    fill(cache, captions)
    digests = {cache.key(caption).digest for caption in captions}
    assert {file.stem for file in files(tmp_path)} == digests
    assert all(file.parent.name == file.stem[:2] and len(file.stem) == 64 for file in files(tmp_path))
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_files_are_plain_safetensors_of_one_sample(tmp_path):
    fill(EmbeddingCache(tmp_path, model="clip"), ["a", "b"])
    loaded = [safetensors.torch.load_file(file) for file in files(tmp_path)]
    for caption in ("a", "b"):
        assert any(torch.equal(tensors["hidden"], embedding(caption)["hidden"]) for tensors in loaded)
    assert all(file.stat().st_size < 1000 for file in files(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_value_equals_the_stored_value_bit_for_bit(tmp_path, dtype):
    cache = EmbeddingCache(tmp_path, model="clip", dtype=dtype)
    assert fill(cache, ["a"]) == [["a"]]
    assert fill(cache, ["a"]) == []


def test_everything_that_a_value_depends_on_is_part_of_its_key(tmp_path):
    image, other = Image.new("RGB", (4, 6), "red"), Image.new("RGB", (6, 4), "red")
    options: dict[str, Any] = {"model": "vae", "resolution": 32, "center_crop": True}
    latents = LatentCache(tmp_path, **options)
    text = EmbeddingCache(tmp_path, model="vae")
    keys = [
        latents.key(latents.identify(image), False),
        latents.key(latents.identify(image), True),
        latents.key(latents.identify(other), False),
        LatentCache(tmp_path, **{**options, "model": "other"}).key(latents.identify(image), False),
        LatentCache(tmp_path, **{**options, "resolution": 64}).key(latents.identify(image), False),
        LatentCache(tmp_path, **options, dtype=torch.float16).key(latents.identify(image), False),
        latents.key(latents.identify("key of the data set"), False),
        text.key("a cat"),
        text.key("a cat "),
        EmbeddingCache(tmp_path, model="other").key("a cat"),
        EmbeddingCache(tmp_path, model="vae", dtype=torch.bfloat16).key("a cat"),
    ]
    assert len({key.digest for key in keys}) == len(keys)
    assert LatentCache(tmp_path, **options).key(latents.identify(image), False, "an image") == keys[0]


def test_keys_change_only_with_the_version(tmp_path):
    described = (
        '[{"crop": "center", "dtype": "torch.float32", "kind": "latents", "model": "vae", "resolution": 32, '
        f'"version": 1}}, {{"file": "{hashlib.sha256(b"bytes").hexdigest()}", "flip": true}}]'
    )
    (tmp_path / "a.png").write_bytes(b"bytes")
    cache = LatentCache(tmp_path / "cache", model="vae", resolution=32, center_crop=True)
    expected = CacheKey(hashlib.sha256(described.encode()).hexdigest(), str(tmp_path / "a.png"))
    assert cache.key(cache.identify(tmp_path / "a.png"), True, str(tmp_path / "a.png")) == expected


def test_latents_keep_mean_and_deviation_of_both_orientations(tmp_path):
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(path.name.encode())
    cache = LatentCache(tmp_path / "cache", model="vae", resolution=8, center_crop=True)

    def get(flips: list[bool], allowed: bool = True) -> dict[str, Tensor]:
        batch = torch.stack([image.flip(-1) if flip else image for image, flip in zip(pixels, flips, strict=True)])
        keys = [cache.key(cache.identify(path), flip) for path, flip in zip(paths, flips, strict=True)]
        batch = batch.contiguous(memory_format=torch.channels_last).requires_grad_()  # as a VAE may return it
        compute = lambda missing: {"mean": batch[missing] * 2, "std": batch[missing].abs()}  # noqa: E731
        return cache.get_or_compute(keys, compute if allowed else refuse_to_compute)

    get([False, True])
    get([True, False])
    for flips in ([False, False], [True, True], [True, False]):
        expected = torch.stack([image.flip(-1) if flip else image for image, flip in zip(pixels, flips, strict=True)])
        result = get(flips, allowed=False)
        assert torch.equal(result["mean"], expected * 2)
        assert torch.equal(result["std"], expected.abs())


def test_tensors_that_share_memory_are_stored(tmp_path):
    hidden = torch.arange(8.0).reshape(1, 4, 2)
    cache = EmbeddingCache(tmp_path, model="clip")
    shared = {"hidden": hidden, "same": hidden, "half": hidden.chunk(2, 1)[1]}
    for compute in (lambda missing: shared, refuse_to_compute):
        result = cache.get_or_compute([cache.key("a")], compute)
        assert {name: tensor.tolist() for name, tensor in result.items()} == {
            name: tensor.tolist() for name, tensor in shared.items()
        }


def damaged(intact: bytes, kind: str) -> bytes:
    flipped = bytearray(intact)
    flipped[-1] ^= 1
    return {
        "empty": b"",
        "cut in its header": intact[:40],
        "cut in its tensors": intact[:-5],
        "zeros": bytes(len(intact)),
        "one bit": bytes(flipped),
        "longer": intact + b"\0",
        "text": b"not a tensor file, of a fair length",
        "huge header": b"\xff" * 8 + intact[8:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["empty", "cut in its header", "cut in its tensors", "zeros", "one bit", "longer", "text", "huge header"],
)
def test_damaged_file_is_reported_and_computed_again(tmp_path, kind, caplog):
    cache = EmbeddingCache(tmp_path, model="clip")
    fill(cache, ["a"])
    (file,) = files(tmp_path)
    intact = file.read_bytes()
    file.write_bytes(damaged(intact, kind))
    with caplog.at_level(logging.WARNING):
        assert fill(cache, ["a"]) == [["a"]]
    assert [record.getMessage().startswith(f"{file} is damaged (") for record in caplog.records] == [True]
    assert len(file.read_bytes()) == len(intact)
    assert fill(cache, ["a"]) == []


def test_file_of_another_sample_or_program_is_computed_again(tmp_path):
    cache = EmbeddingCache(tmp_path, model="clip")
    fill(cache, ["a", "b"])
    first, second = (cache.folder / key[:2] / f"{key}.safetensors" for key in (cache.key(c).digest for c in "ab"))
    os.replace(first, second)
    assert fill(cache, ["b"]) == [["b"]]
    safetensors.torch.save_file({"hidden": torch.zeros(3, 5)}, second)
    assert fill(cache, ["b"]) == [["b"]]


def test_file_that_cannot_be_replaced_is_refused(tmp_path):
    cache = EmbeddingCache(tmp_path, model="clip")
    digest = cache.key("a").digest
    blocked = tmp_path / digest[:2] / f"{digest}.safetensors"
    blocked.mkdir(parents=True)
    with pytest.raises(RefusedInputError) as caught:
        fill(cache, ["a"])
    expected = f"cannot write the cache {blocked} (Is a directory): free space, or choose another folder"
    assert str(caught.value) == expected
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_full_disk_is_refused_and_keeps_the_files_there(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, model="clip")
    fill(cache, ["a"])
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(
            RefusedInputError, match=r"cannot write the cache .* \(No space left on device\): free space"
        ):
            fill(cache, ["b"])
    assert list((tmp_path / "unfinished").iterdir()) == []
    assert fill(cache, ["a", "b"]) == [["b"]]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        RefusedInputError, match=r"cannot write the cache .*/file/cache \(Not a directory\): free space"
    ):
        EmbeddingCache(tmp_path / "file" / "cache", model="clip")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_latents_that_are_not_finite_in_the_stored_type_are_refused_by_name(tmp_path, value):
    options: dict[str, Any] = {"model": "vae", "resolution": 8, "center_crop": True, "dtype": torch.float16}
    cache = LatentCache(tmp_path, **options)
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    keys = [cache.key(cache.identify(image), False, f"{name}.png") for image, name in zip(images, "ab", strict=True)]
    mean = torch.zeros(2, 4, 1, 1)
    mean[1, 2] = value
    expected = (
        r"b\.png: mean is not finite in torch\.float16: run the encoder in float32 or bfloat16, or replace the sample"
    )
    with pytest.raises(DatasetError, match=expected):
        cache.get_or_compute(keys, lambda missing: {"mean": mean, "std": torch.ones_like(mean)})
    assert not cache._file(keys[1].digest).exists()


def test_random_crops_are_refused(tmp_path):
    expected = "cached latents cannot follow random crops: set center_crop, or turn the latent cache off"
    with pytest.raises(RefusedInputError, match=expected):
        LatentCache(tmp_path, model="vae", resolution=8, center_crop=False)


def test_wrong_number_of_computed_samples_is_refused(tmp_path):
    cache = EmbeddingCache(tmp_path, model="clip")
    with pytest.raises(ValueError, match="compute must return 2 samples, got 3 of 'hidden'"):
        cache.get_or_compute([cache.key("a"), cache.key("b")], lambda missing: {"hidden": torch.zeros(3, 2)})


def test_abandoned_files_are_removed_and_recent_ones_kept(tmp_path):
    cache = EmbeddingCache(tmp_path, model="clip")
    old, recent = tmp_path / "unfinished" / "old", tmp_path / "unfinished" / "recent"
    for file in (old, recent):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    EmbeddingCache(cache.folder, model="clip")
    assert (old.exists(), recent.exists()) == (False, True)


def test_missing_image_is_refused_by_name(tmp_path):
    cache = LatentCache(tmp_path / "cache", model="vae", resolution=8, center_crop=True)
    with pytest.raises(DatasetError, match=r"/gone\.png cannot be read \(No such file or directory\): check the file"):
        cache.identify(tmp_path / "gone.png")


# Killed processes. The children are forked: they inherit torch instead of importing it.

CAPTIONS = [f"caption {number}" for number in range(60)]
FORK = multiprocessing.get_context("fork")


def write_until_killed(folder: Path, offset: int) -> None:
    while True:
        for generation in range(1000):
            cache = EmbeddingCache(folder / str(generation), model="clip")
            for first in range(0, len(CAPTIONS), 4):
                fill(cache, [CAPTIONS[(first + offset + row) % len(CAPTIONS)] for row in range(4)])


def test_processes_killed_while_writing_leave_a_cache_that_serves_right_values(tmp_path):
    chance = random.Random(1)
    kills = 0
    while kills < 10 or (not any(map(files, tmp_path.iterdir())) and kills < 200):  # A loaded machine takes more kills.
        kills += 1
        workers = [FORK.Process(target=write_until_killed, args=(tmp_path, offset)) for offset in (0, 7)]
        for worker in workers:
            worker.start()
        time.sleep(chance.uniform(0.02, 0.2))
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            assert worker.exitcode == -signal.SIGKILL
    generations = [folder for folder in tmp_path.iterdir() if files(folder)]
    assert generations
    for folder in generations:
        present = len(files(folder))
        (recomputed,) = fill(EmbeddingCache(folder, model="clip"), CAPTIONS) or [[]]
        assert len(recomputed) == len(CAPTIONS) - present


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_then_die(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        die()


def replace_then_die(source: Path, target: Path) -> None:
    os.rename(source, target)
    die()


def fill_with(folder: Path, owner: Any, name: str, replacement: Any) -> None:
    setattr(owner, name, replacement)
    fill(EmbeddingCache(folder, model="clip"), ["a", "b"])


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "computed"),
    [
        (Path, "write_bytes", half_then_die, [["a", "b"]]),
        (os, "replace", die, [["a", "b"]]),
        (os, "replace", replace_then_die, [["b"]]),
    ],
    ids=["half written", "before the rename", "after the rename"],
)
def test_process_killed_at_any_step_of_a_write_loses_only_that_sample(tmp_path, owner, name, replacement, computed):
    child = FORK.Process(target=fill_with, args=(tmp_path, owner, name, replacement))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert fill(EmbeddingCache(tmp_path, model="clip"), ["a", "b"]) == computed
    assert fill(EmbeddingCache(tmp_path, model="clip"), ["a", "b"]) == []
