"""The start of a network of depth, which stock diffusers keeps in the configuration without a warning."""

from pathlib import Path

import diffusers.configuration_utils
import pytest
from diffusers import UNet2DConditionModel

from d2f_fast.models.depth_start import CONFIG_ENTRY, set_start, start_tags

ZEROS = {"d2f.task": "depth", "d2f.start": "zeros"}


def test_start_from_zeros_outlives_stock_diffusers_without_a_warning(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", warnings.append)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    set_start(unet, from_zeros=False)
    assert CONFIG_ENTRY not in unet.config and start_tags(unet.config) == {}
    set_start(unet, from_zeros=True)
    for name in ("first", "again"):
        unet.save_pretrained(tmp_path / name)
        unet = UNet2DConditionModel.from_pretrained(tmp_path / name)
        assert start_tags(unet.config) == ZEROS and not warnings
    assert start_tags(UNet2DConditionModel.from_config(unet.config).config) == ZEROS and not warnings
    set_start(unet, from_zeros=False)
    assert start_tags(unet.config) == {}
    # An entry without the underscore is kept, too, but stock diffusers warns about it at each load.
    unet.register_to_config(reflection_padding=True)
    unet.save_pretrained(tmp_path / "warned")
    UNet2DConditionModel.from_pretrained(tmp_path / "warned")
    assert "reflection_padding" in warnings[0]
