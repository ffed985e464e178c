"""Names of single layers in the original code; tests/models/test_original_layout.py compares whole networks."""

from typing import Any

import pytest
from torch import nn

from d2f_fast.lora.original_names import diffusers_unet_name, original_unet_name

CONFIG = {"layers_per_block": 2, "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("conv_norm_out", "out.0"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.resnets.1.norm1", "middle_block.2.in_layers.0"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        (
            "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q",
            "output_blocks.5.1.transformer_blocks.0.attn1.to_q",
        ),
        ("up_blocks.2.upsamplers.0.conv", None),
        ("encoder_hid_proj", None),
    ],
)
def test_layer_has_the_name_of_the_original_code(name: str, original: str | None) -> None:
    assert original_unet_name(name, CONFIG) == original


def test_entries_that_a_configuration_lacks_are_those_of_diffusers() -> None:
    for name in ("down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"):
        assert original_unet_name(name, {}) == original_unet_name(name, CONFIG)
    assert diffusers_unet_name("output_blocks.99.2.conv", {}) is None


def test_network_with_other_numbers_of_layers_has_no_original_names() -> None:
    config = CONFIG | {"layers_per_block": [2, 3]}
    assert original_unet_name("down_blocks.0.resnets.0.conv1", config) is None
    assert original_unet_name("conv_in", config) == "input_blocks.0.0"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_original_name_leads_back_to_the_layer(family: str, family_unet: Any) -> None:
    unet = family_unet(family)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    originals = {name: original_unet_name(name, unet.config) for name in layers}
    assert {name: diffusers_unet_name(str(found), unet.config) for name, found in originals.items()} == {
        name: name for name in layers
    }
    assert diffusers_unet_name("nowhere.0", unet.config) is None
