"""Layers of a model by the headers of its files, against those of the loaded pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.lora.key_names import layers_of
from d2f_fast.models.layers import check_lora_fits, model_layers
from d2f_fast.models.options import ModelOptions


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_layers_of_a_single_file_are_those_of_its_pipeline(
    family: str, write_file: Callable[..., Path], narrow: Callable[[str], Any]
) -> None:
    found, expected = model_layers(str(write_file(family)), ModelOptions()), layers_of(narrow(family))
    assert found is not None and found.shapes == expected.shapes and not found.unknown
    assert found.names_in_files() == expected.names_in_files()


def test_layers_of_a_folder_are_those_of_its_pipeline(tiny_folder: Path, pipeline: Any) -> None:
    found, expected = model_layers(str(tiny_folder), ModelOptions()), layers_of(pipeline)
    assert found is not None and found.shapes == expected.shapes and not found.unknown
    assert found.names_in_files() == expected.names_in_files()


def test_first_layer_of_a_network_that_sees_an_image_is_widened_once(tiny_folder: Path) -> None:
    for images, channels in ((0, 4), (1, 8)):
        found = model_layers(str(tiny_folder), ModelOptions(), images)
        assert found is not None and found.shapes["unet.conv_in"] == (8, channels, 3, 3)


def test_lora_is_compared_where_the_files_of_the_model_are_here(tiny_folder: Path, tmp_path: Path) -> None:
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = [f"{tmp_path / 'x.safetensors'}:0.5"]
    assert [header.path for header in check_lora_fits(lora, str(tiny_folder), ModelOptions())] == [
        tmp_path / "x.safetensors"
    ]
    with pytest.raises(ModelError, match="takes 4 channels, and this one takes 8"):
        check_lora_fits(lora, str(tiny_folder), ModelOptions(), images=1)
    with pytest.raises(ModelError, match="does not fit this model's 48 x 36"):
        check_lora_fits(lora, "miniature", ModelOptions())
