"""Ranks of updates, against their products in float64 and against the full singular value decomposition."""

import pytest
import torch
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.lora.layer_weights import LoraLayerWeights
from d2f_fast.lora.resize import added, approximated, folded, resized


def random_layer(out: int, inner: tuple[int, ...], rank: int, alpha: float) -> LoraLayerWeights:
    ones = (1,) * (len(inner) - 1)
    return LoraLayerWeights(torch.randn(rank, *inner), torch.randn(out, rank, *ones), alpha)


def product(layer: LoraLayerWeights) -> Tensor:
    """Return the update in float64."""
    return layer.up.flatten(1).double() @ layer.down.flatten(1).double() * (layer.alpha / layer.rank)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("inner", [(7,), (5, 3, 3)], ids=["linear", "convolution"])
def test_sum_is_exact_and_its_rank_is_the_sum_of_the_ranks(inner: tuple[int, ...]) -> None:
    first, second = random_layer(9, inner, 2, 3.0), random_layer(9, inner, 4, 4.0)
    total = added([({"a": first, "b": first}, 0.8), ({"a": second}, -0.5)])
    assert (total["a"].rank, total["a"].alpha, total["a"].down.shape[1:]) == (6, 6.0, inner)
    assert relative(product(total["a"]), 0.8 * product(first) - 0.5 * product(second)) <= 1e-6
    assert relative(product(total["b"]), 0.8 * product(first)) <= 1e-6


def test_linear_layer_and_its_form_as_a_convolution_are_added() -> None:
    first, second = random_layer(9, (7,), 2, 2.0), random_layer(9, (7, 1, 1), 1, 1.0)
    total = added([({"a": first}, 1.0), ({"a": second}, 1.0)])["a"]
    assert total.down.shape == (3, 7, 1, 1) and total.up.shape == (9, 3, 1, 1)
    assert relative(product(total), product(first) + product(second)) <= 1e-6


def test_updates_of_different_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match="a has updates of different sizes"):
        added([({"a": random_layer(9, (7,), 2, 2.0)}, 1.0), ({"a": random_layer(9, (6,), 2, 2.0)}, 1.0)])


def test_scale_of_one_leaves_the_matrices_as_they_are() -> None:
    layer = random_layer(4, (3,), 2, 2.0)
    assert folded(layer).up is layer.up and folded(layer).down is layer.down
    assert relative(product(folded(layer, 0.3)), 0.3 * product(layer)) <= 1e-6


@pytest.mark.parametrize("inner", [(30,), (6, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("rank", [1, 5])
def test_smaller_rank_is_the_best_one(inner: tuple[int, ...], rank: int) -> None:
    layer = random_layer(20, inner, 8, 4.0)
    small = resized(layer, rank)
    left, values, right = torch.linalg.svd(product(layer), full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert (small.rank, small.alpha, small.down.shape[1:]) == (rank, float(rank), inner)
    assert relative(product(small), best) <= 1e-6


def test_rank_larger_than_a_side_is_cut_without_error() -> None:
    layer = random_layer(4, (30,), 10, 10.0)
    assert relative(product(resized(layer, 4)), product(layer)) <= 1e-6
    assert resized(layer, 12).rank == 10


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 3, 3, 3), (40, 2, 3, 3)], ids=str)
def test_full_rank_is_exact(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape)
    layer = approximated(delta, 1000)
    assert torch.equal((layer.up.flatten(1) @ layer.down.flatten(1)).reshape(shape), delta)
    assert layer.rank == min(delta.flatten(1).shape)


@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["flat", "decaying"])
@pytest.mark.parametrize("rank", [4, 40])
def test_error_of_an_extracted_rank_is_the_least_possible(decay: float, rank: int) -> None:
    left, _ = torch.linalg.qr(torch.randn(120, 96, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))
    values = torch.exp(-decay * torch.arange(96, dtype=torch.float64))
    delta = left * values @ right.T
    error = (product(approximated(delta.float(), rank)) - delta).norm()
    assert error <= 1.01 * values[rank:].norm()


def test_randomised_decomposition_gives_the_same_bits_and_leaves_the_generator() -> None:
    delta = torch.randn(90, 100)
    state = torch.get_rng_state()
    first, second = approximated(delta, 3), approximated(delta, 3)
    assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)
    assert torch.equal(torch.get_rng_state(), state)
