"""Adapters in a UNet: no change at the start, only the adapter trains, and impossible ones are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from d2f_fast.errors import ModelError
from d2f_fast.lora.inject import inject_lora, lora_layers

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({}, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    "feed-forward": ({"target_modules": ("ff.net.0.proj", "ff.net.2")}, "transformer_blocks.0.ff.net.2"),
    "1x1 convolution": ({"target_modules": ("proj_in",)}, "down_blocks.0.attentions.0.proj_in"),
    "residual block": ({"conv_rank": 3}, "up_blocks.1.resnets.0.conv1"),
    "shortcut": ({"conv_rank": 3}, "up_blocks.0.resnets.0.conv_shortcut"),
    "downsampler": ({"conv_rank": 3}, "down_blocks.0.downsamplers.0.conv"),
    "upsampler": ({"conv_rank": 3}, "up_blocks.0.upsamplers.0.conv"),
    "first": ({"first_last_layers": True}, "conv_in"),
    "last": ({"first_last_layers": True}, "conv_out"),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("linear", torch.bfloat16), ("first", torch.bfloat16)],
)
def test_new_adapter_changes_nothing_until_it_trains(unet: Any, kind: str, dtype: torch.dtype, forward: Any) -> None:
    options, ending = KINDS[kind]
    unet.to(dtype)
    before = forward(unet)
    inject_lora(unet, 2, **options)
    names = [name for name in lora_layers(unet) if name.endswith(ending)]
    assert names
    layer: Any = lora_layers(unet)[names[0]]
    biases = {"feed-forward", "linear", "1x1 convolution", "residual block", "shortcut", "first", "last"}
    assert kind not in biases or layer.base_layer.bias.abs().min() > 0  # a dropped bias would show
    assert torch.equal(forward(unet), before)
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.5)
    assert not torch.equal(forward(unet), before)


def test_only_the_adapter_trains_and_is_float32_in_any_base(unet: Any, randomize: Any) -> None:
    unet.to(torch.bfloat16)
    trainable = inject_lora(unet, 2, conv_rank=2, first_last_layers=True)
    assert trainable and all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (name in trainable), name
        assert name in trainable or parameter.dtype == torch.bfloat16
    randomize(unet)
    unet(torch.randn(1, 4, 8, 8).bfloat16(), 5, torch.randn(1, 8, 16).bfloat16()).sample.float().sum().backward()
    assert {name for name, parameter in unet.named_parameters() if parameter.grad is not None} == set(trainable)


def test_initial_weights_depend_on_the_seed_alone(tiny_folder: Path) -> None:
    initial = []
    for seed, disturbance in ((3, 0), (3, 99), (4, 0)):
        torch.manual_seed(disturbance)
        unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
        state = torch.get_rng_state()
        initial.append({k: v.detach() for k, v in inject_lora(unet, 2, seed=seed).items()})
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(initial[0][name], initial[1][name]) for name in initial[0])
    assert not all(torch.equal(initial[0][name], initial[2][name]) for name in initial[0])


@pytest.mark.parametrize("layer", ["conv_in", "conv_out"])
def test_first_and_last_layer_are_as_expressive_as_full_weights(
    tiny_folder: Path, unet: Any, layer: str, forward: Any, relative: Any
) -> None:
    change = torch.randn_like(getattr(unet, layer).weight)
    inject_lora(unet, 2, alpha=3.0, first_last_layers=True)
    adapted: Any = lora_layers(unet)[layer]
    a, b, rank = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight, adapted.r["default"]
    u, s, vh = torch.linalg.svd(change.flatten(1) / adapted.scaling["default"], full_matrices=False)
    assert len(s) <= rank
    with torch.no_grad():
        a.zero_().flatten(1)[: len(s)] = vh
        b.zero_().flatten(1)[:, : len(s)] = u * s
    full = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    with torch.no_grad():
        getattr(full, layer).weight.add_(change)
    assert relative(forward(unet) - forward(full), forward(full)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2, "target_modules": ("to_z",)}, "target_modules: 'to_z' is not a linear or convolution layer"),
        (
            {"rank": 2, "target_modules": ("to_q", "to_z")},
            "target_modules: 'to_z' is not a linear or convolution layer",
        ),
        ({"rank": 2, "target_modules": ("norm1",)}, "target_modules: 'norm1' is not a linear or convolution layer"),
        ({"rank": 0}, "rank must be at least 1 and conv_rank at least 0, got 0 and 0"),
        ({"rank": 2, "conv_rank": -1}, "rank must be at least 1 and conv_rank at least 0, got 2 and -1"),
    ],
    ids=str,
)
def test_impossible_adapter_is_refused_and_leaves_the_network_unchanged(
    unet: Any, options: dict[str, Any], sentence: str
) -> None:
    keys = list(unet.state_dict())
    with pytest.raises(ModelError, match=re.escape(sentence)) as caught:
        inject_lora(unet, **options)
    assert "\n" not in str(caught.value)
    assert list(unet.state_dict()) == keys
    inject_lora(unet, 2)


def test_second_adapter_is_refused(unet: Any) -> None:
    inject_lora(unet, 2)
    with pytest.raises(ModelError, match=r"the UNet takes no LoRA on .*: .*default.* already"):
        inject_lora(unet, 2)
