"""Order of the samples and their augmentation: exact at any step, and independent of the batch size."""

import itertools

import numpy as np
import pytest

from d2f_fast.data.order import (
    Augmentation,
    Mixture,
    batch_indices,
    iterate_indices,
    plan_batches,
    sample_augmentation,
    steps_per_epoch,
)

MASK = 2**64 - 1


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


def test_single_step_is_the_same_step_of_the_stream():
    stream = itertools.islice(iterate_indices(10, 4, 3), 12)
    assert [batch_indices(10, 4, 3, step) for step in range(12)] == list(stream)
    assert list(itertools.islice(iterate_indices(10, 4, 3, 5), 7)) == [
        batch_indices(10, 4, 3, step) for step in range(5, 12)
    ]


def test_order_depends_on_seed_and_epoch_and_not_on_the_batch_size():
    assert len({tuple(batch_indices(50, 50, seed, epoch)[1]) for seed in range(3) for epoch in range(3)}) == 9
    joined = [index for _, indices in itertools.islice(iterate_indices(50, 7, 1), 8) for index in indices]
    assert joined == batch_indices(50, 50, 1, 0)[1]


def test_stream_sorts_once_an_epoch(monkeypatch):
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
def test_impossible_order_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        batch_indices(*arguments)


# Augmentation.


def test_augmentation_is_the_top_53_bits_of_one_philox_block():
    for seed, epoch, index in [(0, 0, 0), (7, 3, 1000), (2**63, 2**40, 2**33)]:
        words = philox_words((seed, 1), [0, index, epoch, 0], 4)
        flip, vertical, horizontal, caption = (word // 2**11 / 2**53 for word in words)
        assert sample_augmentation(seed, epoch, index) == Augmentation(flip, (vertical, horizontal), caption)


def test_augmentation_is_uniform_and_uncorrelated():
    augmentations = [sample_augmentation(0, epoch, index) for epoch in range(4) for index in range(1000)]
    values = np.array([[each.flip, *each.crop, each.caption] for each in augmentations])
    assert values.min() >= 0
    assert values.max() < 1
    # Five standard errors of a uniform variable's mean and variance, and of a correlation.
    assert np.abs(values.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 4000)
    assert np.abs(values.var(0) - 1 / 12).max() < 5 * np.sqrt(1 / 180 / 4000)
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 5 / np.sqrt(4000)
    assert [each.mirrored for each in augmentations] == (values[:, 0] < 0.5).tolist()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\), got 2 of 2"),
    ],
)
def test_impossible_rank_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(plan_batches(11, 4, 7, **options))


# Mixtures.


def test_each_epoch_of_a_mixture_holds_the_rounded_shares_and_passes_through_each_data_set():
    mixture = Mixture((54, 20), (0.9, 0.1))
    assert mixture.counts == (67, 7)  # 66.6 and 7.4 of 74
    plans = list(itertools.islice(plan_batches(74, 8, 3, mixture=mixture), 10 * 20))
    samples = [index for plan in plans for index in plan.index]
    for epoch in range(20):
        of_epoch = samples[74 * epoch : 74 * (epoch + 1)]
        assert sum(index < 54 for index in of_epoch) == 67 and sum(index >= 54 for index in of_epoch) == 7
    # 20 epochs hold 1340 samples of the first data set and 140 of the second: 24.8 and 7 passes.
    counts = np.bincount(samples, minlength=74)
    assert set(counts[:54]) == {24, 25} and set(counts[54:]) == {7}
    assert [mixture.locate(index) for index in (0, 53, 54, 73)] == [(0, 0), (0, 53), (1, 0), (1, 19)]


def test_mixture_is_the_same_at_any_step_for_any_number_of_processes():
    mixture = Mixture((5, 11, 3), (2.0, 1.0, 1.0))
    whole = list(itertools.islice(plan_batches(19, 4, 7, mixture=mixture), 15))
    assert list(itertools.islice(plan_batches(19, 4, 7, 8, mixture=mixture), 7)) == whole[8:]
    for world_size in (2, 3):
        slices = [
            plan_batches(19, 4, 7, rank=rank, world_size=world_size, mixture=mixture) for rank in range(world_size)
        ]
        for plan, *parts in zip(whole, *slices, strict=False):
            assert [index for part in parts for index in part.index] == plan.index
            assert [each for part in parts for each in part.augmentations] == plan.augmentations


def test_sample_that_comes_twice_in_an_epoch_is_augmented_anew():
    (plan,) = itertools.islice(plan_batches(12, 12, 0, mixture=Mixture((2, 10), (3.0, 1.0))), 1)
    assert sum(index < 2 for index in plan.index) == 9
    assert len(set(plan.augmentations)) == 12
    again = next(plan_batches(12, 12, 1, mixture=Mixture((2, 10), (3.0, 1.0))))
    assert again.index != plan.index


@pytest.mark.parametrize(
    ("sizes", "weights", "sentence"),
    [
        ((3, 4), (1.0,), "there must be one weight for each data set, got 1 for 2"),
        ((3, 4), (1.0, 0.0), "sizes and weights must be positive and finite"),
        ((3, 4), (1.0, float("nan")), "sizes and weights must be positive and finite"),
        ((3, 4), (1000.0, 1.0), "the weight 1.0 leaves data set 1 without a sample in an epoch"),
    ],
)
def test_impossible_mixture_is_refused(sizes, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mixture(sizes, weights)
    with pytest.raises(ValueError, match="the mixture must have 8 samples, got 7"):
        next(plan_batches(8, 4, 0, mixture=Mixture((3, 4), (1.0, 1.0))))


# Data sets that are kept apart.


def test_batch_of_data_sets_that_are_kept_apart_holds_samples_of_one():
    mixture = Mixture((54, 20), (0.9, 0.1), apart=True)  # 67 and 7 samples in an epoch
    assert steps_per_epoch(74, 8, mixture) == 9 + 1 and steps_per_epoch(74, 8, Mixture((54, 20), (0.9, 0.1))) == 10
    plans = list(itertools.islice(plan_batches(74, 8, 3, mixture=mixture), 10 * 20))
    for plan in plans:
        assert {mixture.locate(index)[0] for index in plan.index} == {plan.part}
    for epoch in range(20):
        of_epoch = plans[10 * epoch : 10 * (epoch + 1)]
        assert {plan.epoch for plan in of_epoch} == {epoch}
        sizes = sorted((plan.part, plan.global_batch_size) for plan in of_epoch)
        assert sizes == sorted([(0, 8)] * 8 + [(0, 3), (1, 7)])
    assert len({tuple(plan.part for plan in plans[10 * epoch : 10 * (epoch + 1)]) for epoch in range(20)}) > 5
    counts = np.bincount([index for plan in plans for index in plan.index], minlength=74)
    assert set(counts[:54]) == {24, 25} and set(counts[54:]) == {7}


def test_data_sets_that_are_kept_apart_are_the_same_at_any_step_for_any_number_of_processes():
    mixture = Mixture((5, 11, 3), (2.0, 1.0, 1.0), apart=True)
    whole = list(itertools.islice(plan_batches(19, 4, 7, mixture=mixture), 25))
    for step in (1, 8, 13):
        assert list(itertools.islice(plan_batches(19, 4, 7, step, mixture=mixture), 25 - step)) == whole[step:]
    slices = [plan_batches(19, 4, 7, rank=rank, world_size=3, mixture=mixture) for rank in range(3)]
    for plan, *parts in zip(whole, *slices, strict=False):
        assert [index for part in parts for index in part.index] == plan.index
        assert {part.part for part in parts} == {plan.part}  # also of a process without a sample
    with pytest.raises(ValueError, match="start_step must be at least 0, got -1"):
        next(plan_batches(19, 4, 7, -1, mixture=mixture))
