"""Malformed batches are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast.data.batch import check_batch, check_values
from d2f_fast.errors import RefusedInputError


def batch(**changes: Any) -> Any:
    return {"latents": torch.randn(4, 4, 8, 8), "encoder_hidden_states": torch.randn(4, 8, 16), **changes}


def posterior(**changes: Tensor) -> Any:
    return {"mean": torch.zeros(4, 4, 8, 8), "std": torch.ones(4, 4, 8, 8), **changes}


@pytest.mark.parametrize(("change", "sentence"), [
    ({"latents": None}, "latents must be a tensor, got NoneType"),
    ({"latents": torch.zeros(4, 4, 8, 8, dtype=torch.uint8)}, r"latents must be floating, .* got \[4, 4, 8, 8\] torch"),
    ({"latents": torch.zeros(4, 8, 8)}, r"latents must be floating, \[samples, .*\], got \[4, 8, 8\]"),
    ({"encoder_hidden_states": torch.zeros(5, 8, 16)}, "encoder_hidden_states has 5 samples and latents 4: all"),
    ({"noise": torch.ones(4, 4, 8, 4)}, r"noise and latents must have the same shape, got \[4, 4, 8, 4\] and \[4, 4"),
    ({"noise": torch.ones(4, 4, 8, 8, dtype=torch.int64)}, "noise must be floating, .* torch.int64"),
    ({"mask": torch.ones(3, 1, 8, 8)}, "mask has 3 samples and latents 4"),
    ({"mask": torch.ones(8, 8)}, r"mask must be floating, .* got \[8, 8\] torch.float32"),
    ({"added_cond_kwargs": {"time_ids": torch.ones(3, 6)}}, "time_ids has 3 samples and latents 4"),
])  # fmt: skip
def test_malformed_batch_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        check_batch(batch(**change))


@pytest.mark.parametrize(("keys", "sentence"), [
    ([], "a batch needs latents or pixel_values, got nothing"),
    (["latents"], "a batch needs encoder_hidden_states or input_ids, got latents"),
])  # fmt: skip
def test_batch_without_images_or_texts_is_refused(keys: list[str], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        check_batch({name: batch()[name] for name in keys})  # type: ignore[misc]


def test_posterior_without_a_matching_deviation_is_refused() -> None:
    texts = {"encoder_hidden_states": torch.randn(4, 8, 16)}
    check_batch(posterior() | texts)
    with pytest.raises(RefusedInputError, match="a batch with mean needs std, got mean, encoder_hidden_states"):
        check_batch({"mean": torch.zeros(4, 4, 8, 8), **texts})  # type: ignore[typeddict-item]
    with pytest.raises(RefusedInputError, match="std has 3 samples and mean 4"):
        check_batch(posterior(std=torch.ones(3, 4, 8, 8)) | texts)


def test_source_needs_latents_of_its_shape() -> None:
    source = torch.randn(4, 4, 8, 8)
    for share in (0.0, 0.5, 1):
        check_batch(batch(source=source, source_noise=share))
    with pytest.raises(RefusedInputError, match=r"source_noise must be in \[0, 1\], got 25: give the share of noise"):
        check_batch(batch(source=source, source_noise=25))
    with pytest.raises(RefusedInputError, match=r"source_noise 0\.5 needs source, the latents that the flow starts"):
        check_batch(batch(source_noise=0.5))
    with pytest.raises(RefusedInputError, match="source and latents must have the same shape"):
        check_batch(batch(source=source[..., :4]))
    texts = {"encoder_hidden_states": torch.randn(4, 8, 16)}
    with pytest.raises(RefusedInputError, match="a batch with source needs latents, or mean and std, got pixel_values"):
        check_batch({"pixel_values": torch.zeros(4, 3, 16, 16), "source": source, **texts})


def test_one_mask_for_all_samples_is_accepted() -> None:
    check_batch(batch(mask=torch.ones(1, 1, 8, 8, dtype=torch.bool), added_cond_kwargs=None))


@pytest.mark.parametrize(("change", "sentence"), [
    ({"pixel_values": torch.full((4, 3, 8, 8), 255.0)}, r"pixel_values must be in \[-1, 1\], got 255 to 255: divide"),
    ({"pixel_values": torch.full((4, 3, 8, 8), -1.5)}, r"pixel_values must be in \[-1, 1\], got -1.5 to -1.5"),
    ({"mean": torch.zeros(4, 4, 8, 8), "std": torch.full((4, 4, 8, 8), -4.0)}, "std must be 0 or larger, got -4"),
    ({"mask": torch.full((1, 1, 8, 8), -1)}, "mask must be 0 or larger, got -1 to -1"),
    ({"input_ids": torch.full((4, 8), 54)}, r"input_ids must be in \[0, 54\), got 54 to 54"),
    ({"input_ids": torch.full((4, 8), -1)}, r"input_ids must be in \[0, 54\), got -1 to -1"),
])  # fmt: skip
def test_values_outside_their_range_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        check_values(batch(**change), 54)


def test_values_at_the_ends_of_their_ranges_are_accepted() -> None:
    pixels = torch.tensor([-1.0, 1.0]).repeat(4, 3, 8, 4)
    ids = torch.tensor([0, 53]).repeat(4, 4)
    check_values(batch(pixel_values=pixels, mask=torch.zeros(1, 1, 8, 8, dtype=torch.bool), input_ids=ids), 54)


def test_noise_without_the_latents_that_it_belongs_to_is_refused() -> None:
    check_batch(batch(noise=torch.randn(4, 4, 8, 8)))
    texts = {"encoder_hidden_states": torch.randn(4, 8, 16), "noise": torch.randn(4, 4, 8, 8)}
    with pytest.raises(RefusedInputError, match="a batch with noise needs the latents that it belongs to, got mean"):
        check_batch(posterior() | texts)
