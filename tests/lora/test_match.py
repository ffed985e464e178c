"""Layers of LoRA files matched with a pipeline, and files of other models refused with the reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.lora.key_names import adaptable_layers
from d2f_fast.lora.match import match_layers
from d2f_fast.lora.read import LoraFile, read_lora

TEXT = "encoder.layers.0.self_attn.q_proj"


def lora_of(tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> LoraFile:
    """Return a LoRA of rank 2 with peft's or kohya's keys, by the names and shapes of its layers."""
    tensors = {}
    for name, (rows, columns) in shapes.items():
        down, up = ("lora_down", "lora_up") if name.startswith("lora_") else ("lora_A", "lora_B")
        tensors |= {f"{name}.{down}.weight": torch.ones(2, columns), f"{name}.{up}.weight": torch.ones(rows, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    return read_lora(tmp_path / "x.safetensors")


@pytest.fixture
def families(family_unet: Any) -> Any:
    """Return the function `families(family)`: what a pipeline of the family has that matters here, its UNet."""
    return lambda family: SimpleNamespace(unet=family_unet(family), text_encoder=None, text_encoder_2=None)


def test_module_and_name_of_each_layer_are_found(tiny_xl: Any, tmp_path: Path) -> None:
    names = {
        "lora_unet_conv_in": "unet.conv_in",
        f"lora_te1_text_model_{TEXT.replace('.', '_')}": f"text_encoder.{TEXT}",
        f"text_encoder_2.text_model.{TEXT}": f"text_encoder_2.{TEXT}",
    }
    shapes = {"lora_unet_conv_in": (16, 36)} | dict.fromkeys(list(names)[1:], (16, 16))
    found = match_layers(lora_of(tmp_path, shapes), tiny_xl)
    modules = adaptable_layers(tiny_xl)
    canonical = {id(module): name for name, module in modules.items()}
    assert {name: canonical[id(module)] for name, module in found.items()} == names
    assert all(modules[names[name]] is module for name, module in found.items())


@pytest.mark.parametrize(
    ("of", "model", "sentence"),
    [
        (
            "sdxl",
            "sd1",
            "a LoRA of SDXL (its text is 2048 wide), and this model is Stable Diffusion 1.x (its text is 768",
        ),
        (
            "sd1",
            "sdxl",
            "a LoRA of Stable Diffusion 1.x (its text is 768 wide), and this model is SDXL (its text is 2048",
        ),
        (
            "sd2",
            "sd1",
            "a LoRA of Stable Diffusion 2.x (its text is 1024 wide), and this model is Stable Diffusion 1.x",
        ),
    ],
)
def test_lora_of_another_family_is_refused(of: str, model: str, sentence: str, families: Any, tmp_path: Path) -> None:
    names = [name for name, module in families(of).unet.named_modules() if name.endswith("attn2.to_k")]
    widths = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
    channels = [families(of).unet.get_submodule(name).weight.shape[0] for name in names]
    shapes = {f"unet.{name}": (rows, widths[of]) for name, rows in zip(names, channels, strict=True)}
    with pytest.raises(ModelError) as caught:
        match_layers(lora_of(tmp_path, shapes), families(model))
    assert sentence in str(caught.value) and "give the model that the LoRA was trained on" in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (
            {"unet.conv_in": (8, 36), "unet.nowhere": (2, 2)},
            "1 of 2 layers exist in this model, and unet.nowhere is not one of them: give the model",
        ),
        ({"unet.nowhere": (2, 2)}, "0 of 1 layers exist in this model, and unet.nowhere is not one of them: it is a"),
        ({"transformer.single_transformer_blocks.0.attn.to_q": (2, 2)}, "is of a transformer network (such as Flux or"),
        ({"unet.conv_in": (9, 36)}, "unet.conv_in changes a weight of 9 x 36, which does not fit this model's 8 x 36"),
        (
            {f"text_encoder.{TEXT}": (9, 16)},
            f"text_encoder.{TEXT} changes a weight of 9 x 16, which does not fit this model's 16 x 16: it is a LoRA for"
            " another text encoder",
        ),
        (
            {f"lora_te2_text_model_{TEXT.replace('.', '_')}": (16, 16)},
            "is of a second text encoder, which only SDXL has",
        ),
        (
            {"unet.conv_in": (8, 36), "lora_unet_conv_in": (8, 36)},
            "lora_unet_conv_in and unet.conv_in adapt the same layer: give one LoRA in a file",
        ),
    ],
    ids=str,
)
def test_lora_of_another_model_is_refused(
    shapes: dict[str, tuple[int, int]], sentence: str, unet: Any, tiny_xl: Any, tmp_path: Path
) -> None:
    pipeline = SimpleNamespace(unet=unet, text_encoder=tiny_xl.text_encoder, text_encoder_2=None)
    with pytest.raises(ModelError) as caught:
        match_layers(lora_of(tmp_path, shapes), pipeline)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
