"""A LoRA between two sets of weights, against their difference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.files.tensor_stream import LazyTensor
from d2f_fast.lora.extract import extract_lora


def components(unet: dict[str, Tensor], text: dict[str, Tensor] | None = None) -> dict[str, dict[str, LazyTensor]]:
    parts = {"unet": unet} | ({} if text is None else {"text_encoder": text})
    return {name: {key: LazyTensor.of(value) for key, value in part.items()} for name, part in parts.items()}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {
        "conv_in.weight": torch.randn(8, 4, 3, 3),
        "conv_in.bias": torch.randn(8),
        "proj.weight": torch.randn(8, 6),
        "same.weight": torch.randn(5, 5),
    }


def changed(weights: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value + torch.randn_like(value) * 0.1 if key in keys else value for key, value in weights.items()}


def test_full_rank_gives_the_finetuned_weights(weights: Any) -> None:
    tuned = changed(weights, "conv_in.weight", "proj.weight")
    lora = extract_lora(components(weights), components(tuned), 1000)
    assert lora.layers.keys() == {"unet.conv_in", "unet.proj"}
    for name, layer in lora.layers.items():
        key = f"{name.removeprefix('unet.')}.weight"
        sum_ = weights[key] + (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(weights[key].shape)
        assert torch.allclose(sum_, tuned[key], rtol=0, atol=1e-6)
    assert lora.left_out == [] and lora.relative_error <= 1e-6


def test_error_says_what_the_rank_cuts_off(weights: Any) -> None:
    tuned = changed(weights, "proj.weight")
    lora = extract_lora(components(weights), components(tuned), 2)
    values = torch.linalg.svdvals(tuned["proj.weight"].double() - weights["proj.weight"].double())
    assert lora.relative_error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)


def test_biases_and_embeddings_that_changed_are_named(weights: Any) -> None:
    text = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 2), "text_model.a.weight": torch.ones(2, 2)}
    base = components(weights, text)
    tuned = components(changed(weights, "conv_in.bias"), {key: value * 2 for key, value in text.items()})
    lora = extract_lora(base, tuned, 4)
    assert lora.layers.keys() == {"text_encoder.text_model.a"}
    assert lora.left_out == ["unet.conv_in.bias", "text_encoder.text_model.embeddings.token_embedding.weight"]


def test_models_that_cannot_be_compared_are_refused(weights: Any) -> None:
    other = weights | {"proj.weight": torch.randn(8, 7)}
    with pytest.raises(ModelError, match=r"unet: proj\.weight is not of one shape in both models"):
        extract_lora(components(weights), components(other), 4)
    with pytest.raises(ModelError, match=r"unet: more\.weight is not"):
        extract_lora(components(weights), components(weights | {"more.weight": torch.ones(1, 1)}), 4)
    with pytest.raises(ModelError, match="the two models are equal"):
        extract_lora(components(weights), components(weights), 4)
    with pytest.raises(ModelError, match=r"differ only in unet\.conv_in\.bias"):
        extract_lora(components(weights), components(changed(weights, "conv_in.bias")), 4)
