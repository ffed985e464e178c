"""Scales of LoRA layers in peft's configuration: what counts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.errors import ModelError
from d2f_fast.lora.scales import ADAPTER_METADATA, PeftScales, checked_alpha

PATH = Path("peft.safetensors")


def alpha_of(metadata: Any, name: str = "unet.a.b", rank: int = 2) -> float | None:
    header = {ADAPTER_METADATA: metadata if isinstance(metadata, str) else json.dumps(metadata)}
    return PeftScales(PATH, header).alpha(name, name, rank, "lora_alpha")


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"unet.lora_alpha": 4}, 4.0),
        ({"lora_alpha": 4}, 4.0),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"b": 8}}, 8.0),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"c": 8}, "unet.rank_pattern": {"a": 7}}, 4.0),
        ({"unet.lora_alpha": 4, "unet.r": 3, "unet.rank_pattern": {"a.b": 2}}, 4.0),
        ({"unet.lora_alpha": 4, "unet.use_rslora": True}, 4 * 2**0.5),
        ({"text_encoder.lora_alpha": 4}, None),
        ({}, None),
    ],
    ids=str,
)
def test_alpha_comes_from_the_header_of_a_peft_file(metadata: Any, alpha: float | None) -> None:
    found = alpha_of(metadata)
    assert found == (alpha if alpha is None else pytest.approx(alpha, rel=1e-12))


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ("[1]", "lora_adapter_metadata in its header is not a JSON object: save the LoRA again"),
        ('{"unet', "lora_adapter_metadata in its header is not a JSON object"),
        ("[" * 100000, "lora_adapter_metadata in its header is not a JSON object"),
        ({"unet.lora_alpha": "a"}, "lora_alpha or alpha_pattern of unet in its header cannot be used"),
        ({"unet.lora_alpha": True}, "lora_alpha or alpha_pattern of unet in its header cannot be used"),
        ('{"unet.lora_alpha": NaN}', "the alpha of unet.a.b is nan, not a number up to 1e"),
        ('{"unet.lora_alpha": 1e999}', "the alpha of unet.a.b is inf"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "lora_alpha or alpha_pattern of unet in its header cannot be used"),
        ({"unet.lora_alpha": 0}, "the alpha of unet.a.b is 0"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}, "'\\(' is a regular expression other than a name"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"b": [2]}}, "lora_alpha or alpha_pattern of unet"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": 3}, "3 is not a table"),
        ({"unet.lora_alpha": 1, "unet.r": 3}, "unet.a.b has rank 2, and its header says 3: the file is damaged"),
        ({"unet.r": -1}, "its header gives unet.a.b the rank -1, not a whole number from 1 on"),
        ({"unet.r": 1.5}, "its header gives unet.a.b the rank 1.5"),
    ],
)
def test_configuration_without_a_usable_scale_is_refused(metadata: Any, sentence: str) -> None:
    with pytest.raises(ModelError, match=rf"LoRA peft\.safetensors: .*{sentence}") as caught:
        alpha_of(metadata)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_alpha_that_cannot_scale_is_refused() -> None:
    assert checked_alpha(PATH, "a", -1e6) == -1e6
    for alpha in (0.0, 2e6, float("inf"), float("nan")):
        with pytest.raises(ModelError, match="the alpha of a is"):
            checked_alpha(PATH, "a", alpha)
