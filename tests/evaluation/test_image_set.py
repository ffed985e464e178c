"""Test that features are computed in batches, in order, and of the middle square of each image."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from d2f_fast.errors import DatasetError
from d2f_fast.evaluation.image_set import (
    FeatureNetwork,
    compute_features,
    generate_squares,
    noise_generator,
    read_squares,
    square,
)
from d2f_fast.sampling.generate import generate


def test_features_are_computed_in_batches_without_reading_ahead() -> None:
    seen: list[int] = []
    read: list[int] = []

    def images() -> Iterator[torch.Tensor]:
        for i in range(5):
            read.append(i)
            yield torch.full((3, 4, 4), float(i))

    def features(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        assert len(read) <= sum(seen)
        return batch.mean((2, 3))

    found = compute_features(images(), FeatureNetwork(features, 4, torch.device("cpu")), batch_size=2)
    assert seen == [2, 2, 1] and found.dtype == np.float32
    assert np.array_equal(found, np.repeat(np.arange(5.0), 3).reshape(5, 3))


def test_square_is_the_middle_of_the_image_and_keeps_the_pixels_of_its_own_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    found = square(Image.fromarray(pixels), 6)
    expected = torch.from_numpy(pixels[:, 2:8].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(found, expected)
    assert square(Image.fromarray(pixels), 4).shape == (3, 4, 4)


@pytest.mark.parametrize("content", ["damaged", "floating point"])
def test_unusable_image_is_named(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.png"
    if content == "damaged":
        path.write_bytes(b"no image")
    else:
        path.touch()
        monkeypatch.setattr("d2f_fast.evaluation.image_set.read_image", lambda path: Image.new("F", (4, 4)))
    with pytest.raises(DatasetError, match=r"b\.png .*: replace it"):
        list(read_squares([path], 4, "images"))


def test_generated_images_depend_on_seed_and_position_and_not_on_the_batch_size(tiny_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    together, apart = (list(generate_squares(pipeline, ["a", "a", "b"], 5, size, 16, **options)) for size in (3, 2))
    torch.testing.assert_close(torch.stack(together), torch.stack(apart), atol=1.01 / 127.5, rtol=0)
    (second,) = generate(pipeline, "a", generator=noise_generator(5, 1), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(together[1], square(second, 16), atol=1.01 / 127.5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_noise_of_two_seeds_is_not_shared() -> None:
    starts = {noise_generator(seed, i).initial_seed() for seed in (0, 1, 2**63 - 1) for i in range(50)}
    assert len(starts) == 150
