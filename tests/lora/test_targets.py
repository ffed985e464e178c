"""Layers and ranks that options state, and a LoRA file contradicts."""

from typing import Any

import pytest

from d2f_fast.errors import ModelError
from d2f_fast.lora.targets import check_stated_layers, check_targets

LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = [f"mid_block.attentions.0.transformer_blocks.{i}.attn1.{leaf}" for i in range(4) for leaf in LEAVES]
LAYERS += ["conv_in", "mid_block.resnets.0.conv1", "conv_out"]
RANKS = {name: 2 for name in LAYERS if name.endswith(("to_q", "to_v"))}
RANKS |= {"mid_block.resnets.0.conv1": 3, "conv_in": 36, "conv_out": 4}
MATCHING: dict[str, Any] = {"rank": 2, "conv_rank": 3, "first_last_layers": True, "target_modules": ("to_q", "to_v")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        (dict.fromkeys(MATCHING), None),
        ({"rank": 4}, "rank is 4, and x has rank 2: leave rank out, so that the file decides"),
        ({"conv_rank": 0}, "conv_rank is 0, and x has rank 3: leave conv_rank out"),
        ({"first_last_layers": False}, "first_last_layers is off, and x has 2 of the two layers: leave first_last"),
        ({"conv_rank": 2}, "conv_rank is 2, and x has rank 3: leave conv_rank out"),
        ({"target_modules": ("to_q",)}, "target_modules is to_q, and x has 4 of its 4 layers, and 4 others"),
        ({"target_modules": ("to_q", "to_k")}, "is to_q to_k, and x has 4 of its 8 layers, and 4 others"),
    ],
    ids=str,
)
def test_options_that_contradict_the_file_are_refused(changes: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        check_stated_layers("x", RANKS, LAYERS, **(MATCHING | changes))
    else:
        with pytest.raises(ModelError, match=sentence):
            check_stated_layers("x", RANKS, LAYERS, **(MATCHING | changes))


def test_layers_that_a_file_lacks_cannot_be_stated() -> None:
    ranks = {name: 2 for name in LAYERS if name.endswith("to_q")}
    for options, sentence in (
        ({"conv_rank": 1}, "conv_rank is 1, and x has no such layers"),
        ({"first_last_layers": True}, "first_last_layers is set, and x has 0 of the two layers"),
    ):
        with pytest.raises(ModelError, match=f"{sentence}: leave "):
            check_stated_layers("x", ranks, LAYERS, **options)  # type: ignore[arg-type]
    check_stated_layers("x", ranks, LAYERS, conv_rank=0, first_last_layers=False)


def test_name_of_no_layer_is_refused() -> None:
    check_targets(("to_q", "attn1.to_k", "conv_in"), LAYERS)
    for name in ("o_q", "attn1", ""):
        with pytest.raises(ModelError, match=f"target_modules: '{name}' is not a linear or convolution layer"):
            check_targets(("to_q", name), LAYERS)
