"""The family of a network is read from its configuration."""

import json
from typing import Any

import pytest

from d2f_fast.lora.family import family_name, family_of, has_sizes_condition
from d2f_fast.miniature import MINIATURE


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_real_configurations_are_recognised(family: str, family_unet: Any) -> None:
    assert family_of(family_unet(family)) == family
    assert has_sizes_condition(family_unet(family)) == (family == "sdxl")


def test_other_networks_have_no_family(unet: Any, tiny_xl: Any, make_family_unet: Any) -> None:
    """Check an unknown width, SDXL's conditions with another width, and SDXL's width without its conditions."""
    assert family_of(unet) is None
    assert family_of(tiny_xl.unet) is None and has_sizes_condition(tiny_xl.unet)
    assert family_of(make_family_unet("sd1", cross_attention_dim=2048)) is None
    assert family_of(make_family_unet("sdxl", cross_attention_dim=1024, transformer_layers_per_block=1)) is None


def test_miniature_is_named_and_every_other_network_in_neutral_words(unet: Any, make_family_unet: Any) -> None:
    bundled = json.loads((MINIATURE / "unet" / "config.json").read_text())
    assert family_name(bundled) == family_name(bundled | {"in_channels": 8, "sample_size": 64}) == "the miniature"
    for other in (unet.config, bundled | {"block_out_channels": [48, 192]}, bundled | {"cross_attention_dim": 64}, {}):
        assert family_name(other) == "a UNet other than SD1.x, SD2.x and SDXL"
    assert family_name(make_family_unet("sd1").config) == "SD1.x"
