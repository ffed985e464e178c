"""Updates in every form, as a whole and as two matrices, against the definitions and against peft's layers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast.lora.layer_weights import (
    HadamardLayerWeights,
    KroneckerLayerWeights,
    LoraLayerWeights,
    loha_weights,
    lokr_weights,
    lora_weights,
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_lora_is_the_scaled_product_of_its_matrices() -> None:
    up, down = random(5, 2), random(2, 6)
    layer = lora_weights({"up": up, "down": down}, 3.0)
    assert (layer.rank, layer.shape, layer.alpha) == (2, (5, 6), 3.0) and layer.as_lora() is layer
    assert error(layer.delta(random(5, 6)), 1.5 * up.double() @ down.double()) < 1e-6


def test_core_of_a_convolution_is_folded_into_its_first_matrix() -> None:
    """Check against the order in which LyCORIS rebuilds the weight."""
    up, core, down = random(5, 2, 1, 1), random(2, 3, 3, 3), random(3, 6, 1, 1)
    layer = lora_weights({"up": up, "mid": core, "down": down}, 2.0)
    rebuilt = torch.einsum("ijmn,pi,jq->pqmn", core, up.flatten(1), down.flatten(1))
    assert layer.shape == (5, 54) and error(layer.delta(rebuilt), rebuilt.flatten(1)) < 1e-6


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
def test_dora_gives_the_adapted_weight_its_norms(shape: tuple[int, ...], axis: int) -> None:
    weight, up, down = random(*shape), random(5, 2), random(2, *shape[1:])
    magnitude = random(shape[axis]).abs()
    given = magnitude if axis == 0 else magnitude.reshape(1, -1)
    layer = lora_weights({"up": up, "down": down, "magnitude": given}, 1.0)
    adapted = weight + layer.delta(weight).reshape(shape)
    others = [i for i in range(len(shape)) if i != axis]
    assert error(torch.linalg.vector_norm(adapted, dim=others), magnitude) < 1e-6
    plain = weight + LoraLayerWeights(down, up, 1.0).delta(weight).reshape(shape)
    directions = [torch.nn.functional.normalize(x.transpose(0, axis).flatten(1)) for x in (adapted, plain)]
    assert error(*directions) < 1e-5


def loha_parts(core: bool) -> dict[str, Tensor]:
    parts = {}
    for i in ("1", "2"):
        parts |= {f"hada_w{i}_a": random(2, 8) if core else random(8, 2), f"hada_w{i}_b": random(2, 6)}
        parts |= {f"hada_t{i}": random(2, 2, 3, 3)} if core else {}
    return parts


@pytest.mark.parametrize("core", [False, True])
def test_loha_is_the_same_as_two_matrices(core: bool) -> None:
    parts = loha_parts(core)
    layer = loha_weights(parts, 3.0)
    products = []
    for i in ("1", "2"):
        a, b = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]
        equation = "ijkl,ip,jr->prkl"
        products.append(torch.einsum(equation, parts[f"hada_t{i}"], a, b).flatten(1) if core else a @ b)
    expected = 1.5 * products[0] * products[1]
    assert layer.shape == expected.shape
    assert error(layer.delta(expected), expected) < 1e-6
    lora = layer.as_lora()
    assert lora.rank == 4 and error(lora.delta(expected), expected) < 1e-6


LOKR: dict[str, dict[str, tuple[int, ...]]] = {
    "whole": {"lokr_w1": (2, 3), "lokr_w2": (4, 5)},
    "second factored": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
    "both factored": {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
    "whole convolution": {"lokr_w1": (2, 3), "lokr_w2": (4, 5, 3, 3)},
    "core": {"lokr_w1": (2, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5), "lokr_t2": (2, 2, 3, 3)},
}


@pytest.mark.parametrize("kind", LOKR)
def test_lokr_is_the_same_as_two_matrices(kind: str) -> None:
    parts = {name: random(*shape) for name, shape in LOKR[kind].items()}
    layer = lokr_weights(parts, 3.0)
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_t2" in parts:
        second = torch.einsum("ijkl,ip,jr->prkl", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
    rank = 1 if kind == "both factored" else 2
    expected = (1.0 if kind.startswith("whole") else 3.0 / rank) * torch.kron(first, second.contiguous()).flatten(1)
    assert layer.shape == expected.shape and error(layer.delta(expected), expected) < 1e-6
    lora = layer.as_lora()
    assert lora.rank <= min(expected.shape) and error(lora.delta(expected), expected) < 1e-6


def test_rank_of_two_matrices_is_at_most_the_full_one() -> None:
    parts = {f"hada_w{i}_{end}": random(*shape) for i in "12" for end, shape in (("a", (4, 3)), ("b", (3, 5)))}
    lora = loha_weights(parts, None).as_lora()
    assert lora.rank == 4 and error(lora.delta(parts["hada_w1_a"]), loha_weights(parts, 3.0).delta(random(1))) < 1e-6


@pytest.mark.parametrize(
    ("make", "parts", "sentence"),
    [
        (lora_weights, {"up": (5,), "down": (2, 6)}, "have no rank in common"),
        (lora_weights, {"up": (5, 0), "down": (0, 6)}, "have no rank in common"),
        (lora_weights, {"up": (5, 2), "down": (3, 6)}, r"the matrices \[5, 2\] and \[3, 6\] have no rank in common"),
        (lora_weights, {"up": (5, 2), "down": (2, 6), "magnitude": (4,)}, "the magnitude .* has no number for each"),
        (lora_weights, {"up": (5, 2), "down": (3, 6), "mid": (2, 2, 3, 3)}, "the core .* does not fit"),
        (lora_weights, {"up": (5, 2), "down": (2,), "mid": (2, 2, 3, 3)}, "the core .* does not fit"),
        (loha_weights, dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (3,)), "no rank in common"),
        (lokr_weights, {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2)}, "lokr_w2 is missing"),
        (lokr_weights, {"lokr_w1": (2,), "lokr_w2": (4, 2)}, "lokr_w1 is not a matrix"),
        (
            lokr_weights,
            {"lokr_w1": (2, 2), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5), "lokr_t2": (3, 2, 3, 3)},
            "the core .* does not fit",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_shapes_that_do_not_fit_are_refused(make: Any, parts: dict[str, tuple[int, ...]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make({name: torch.ones(shape) for name, shape in parts.items()}, 1.0)


def test_small_file_of_a_large_kronecker_product_takes_no_memory() -> None:
    """Check that the shape is known before anything of that size is made."""
    layer = lokr_weights({"lokr_w1": torch.ones(2**16, 1), "lokr_w2": torch.ones(2**16, 1)}, None)
    assert isinstance(layer, KroneckerLayerWeights) and layer.shape == (2**32, 1)
    parts = {
        f"hada_w{i}_{end}": torch.ones(shape) for i in "12" for end, shape in (("a", (2**16, 1)), ("b", (1, 2**16)))
    }
    loha = loha_weights(parts, None)
    assert isinstance(loha, HadamardLayerWeights) and loha.shape == (2**16, 2**16)
