"""LoRA files that do not fit a model, by names and shapes alone; test_match.py compares them with whole pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.lora.fit import ModelLayers, check_named_as_in_diffusers, fitted_layers, known_layers, starting_layers
from d2f_fast.lora.header import LoraHeader, read_lora_header

TEXT = "encoder.layers.0.self_attn.q_proj"
CONFIG = {"cross_attention_dim": 16, "layers_per_block": 1, "up_block_types": ["UpBlock2D"]}
MODEL = ModelLayers({"unet.conv_in": (8, 4, 3, 3), f"text_encoder.{TEXT}": (16, 16)}, CONFIG)


def header_of(tmp_path: Path, layers: dict[str, tuple[int, ...]], dora: bool = False) -> LoraHeader:
    """Return the header of a LoRA of rank 2, by the names of its layers and the shapes of their weights."""
    tensors = {}
    for name, (rows, *columns) in layers.items():
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, *columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
        tensors |= {f"{name}.lora_magnitude_vector": torch.ones(rows)} if dora else {}
    save_file(tensors, tmp_path / "x.safetensors")
    return read_lora_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["unet.conv_in", "lora_unet_conv_in", "lora_unet_input_blocks_0_0"])
def test_layer_is_found_under_every_name(name: str, tmp_path: Path) -> None:
    assert fitted_layers(header_of(tmp_path, {name: (8, 4, 3, 3)}), MODEL) == {name: "unet.conv_in"}


@pytest.mark.parametrize(("trained", "given"), [(4, 8), (8, 4)])
def test_first_layer_of_other_channels_says_both_numbers(trained: int, given: int, tmp_path: Path) -> None:
    model = ModelLayers({"unet.conv_in": (8, given, 3, 3)}, CONFIG)
    with pytest.raises(ModelError) as caught:
        fitted_layers(header_of(tmp_path, {"unet.conv_in": (8, trained, 3, 3)}), model)
    assert str(caught.value) == (
        f"LoRA {tmp_path / 'x.safetensors'}: unet.conv_in changes a weight of 8 x {9 * trained}, which does not fit"
        f" this model's 8 x {9 * given}: it is a LoRA of a network that takes {trained} channels, and this one takes"
        f" {given} (networks that also see an image, as for depth, take more): give the model that the LoRA was trained"
        " on, or one without its first layer"
    )


def test_layers_of_an_unknown_text_encoder_are_not_compared(tmp_path: Path) -> None:
    header = header_of(tmp_path, {"unet.conv_in": (8, 36), f"text_encoder.{TEXT}": (99, 99)})
    model = ModelLayers({"unet.conv_in": (8, 4, 3, 3)}, CONFIG, frozenset({"text_encoder"}))
    assert fitted_layers(header, model) == {"unet.conv_in": "unet.conv_in"}
    with pytest.raises(ModelError, match=r"text_encoder.* is not one of them"):
        fitted_layers(header, ModelLayers(model.shapes, CONFIG))


def test_training_goes_on_from_a_plain_lora_of_the_unet_alone(tmp_path: Path) -> None:
    layers = {"unet.conv_in": (8, 36), f"text_encoder.{TEXT}": (16, 16)}
    assert len(starting_layers(header_of(tmp_path, layers), MODEL)) == 2
    with pytest.raises(ModelError, match="adapts text encoders only, and training adapts the UNet"):
        starting_layers(header_of(tmp_path, {f"text_encoder.{TEXT}": (16, 16)}), MODEL)
    with pytest.raises(ModelError, match=r"unet\.conv_in is a DoRA, which a plain LoRA cannot go on from"):
        starting_layers(header_of(tmp_path, {"unet.conv_in": (8, 36)}, dora=True), MODEL)


def test_names_alone_are_compared_for_another_form(tmp_path: Path) -> None:
    header = header_of(tmp_path, {"lora_unet_conv_in": (9, 9)})
    assert known_layers(header, MODEL) == {"lora_unet_conv_in": "unet.conv_in"}
    text = header_of(tmp_path, {f"text_encoder.{TEXT}": (16, 16)})
    model = ModelLayers({"unet.conv_in": (8, 4, 3, 3)}, CONFIG, frozenset({"text_encoder"}))
    assert known_layers(text, model) == {}
    with pytest.raises(ModelError, match=r"is not a layer of this model: give the folder"):
        known_layers(text, ModelLayers(model.shapes, CONFIG))
    with pytest.raises(ModelError, match="lora_unet_conv_in, do not show which model they are of"):
        check_named_as_in_diffusers(header)
