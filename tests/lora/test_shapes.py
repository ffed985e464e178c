"""Shapes and ranks of updates, against those of the updates themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from d2f_fast.lora.layer_weights import loha_weights, lokr_weights, lora_weights
from d2f_fast.lora.shapes import Shapes, UpdateShape, loha_shape, lokr_shape, lora_shape

LOHA = {f"hada_w{i}_{end}": shape for i in "12" for end, shape in (("a", (8, 2)), ("b", (2, 6)))}


@pytest.mark.parametrize(
    ("shape_of", "make", "parts"),
    [
        (lora_shape, lora_weights, {"up": (5, 2), "down": (2, 6)}),
        (lora_shape, lora_weights, {"up": (5, 2, 1, 1), "down": (2, 6, 3, 3)}),
        (lora_shape, lora_weights, {"up": (5, 2, 1, 1), "mid": (2, 3, 3, 3), "down": (3, 6, 1, 1)}),
        (lora_shape, lora_weights, {"up": (5, 2), "down": (2, 6), "magnitude": (5,)}),
        (loha_shape, loha_weights, LOHA),
        (
            loha_shape,
            loha_weights,
            LOHA | {f"hada_w{i}_a": (2, 8) for i in "12"} | {f"hada_t{i}": (2, 2, 3, 3) for i in "12"},
        ),
        (loha_shape, loha_weights, {f"hada_w{i}_{e}": s for i in "12" for e, s in (("a", (4, 3)), ("b", (3, 5)))}),
        (lokr_shape, lokr_weights, {"lokr_w1": (2, 3), "lokr_w2": (4, 5)}),
        (lokr_shape, lokr_weights, {"lokr_w1": (2, 3), "lokr_w2": (4, 5, 3, 3)}),
        (lokr_shape, lokr_weights, {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}),
        (
            lokr_shape,
            lokr_weights,
            {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (4, 9), "lokr_w2_b": (9, 5)},
        ),
        (
            lokr_shape,
            lokr_weights,
            {"lokr_w1": (2, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5), "lokr_t2": (2, 2, 3, 3)},
        ),
    ],
)
def test_shape_and_rank_are_those_of_the_update(
    shape_of: Callable[[Shapes], UpdateShape], make: Any, parts: dict[str, tuple[int, ...]]
) -> None:
    update = make({name: torch.randn(shape) for name, shape in parts.items()}, 1.0)
    assert shape_of(parts) == (*update.shape, update.as_lora().rank)
