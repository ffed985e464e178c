"""The family of a network is read from its configuration."""

from typing import Any

import pytest

from d2f_fast.lora.family import family_of, has_sizes_condition


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
