"""Headers of single files: what cannot be loaded is refused in one line, without reading a tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_fast.errors import ModelError
from d2f_fast.models.configs import read_configs
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file_header import family_table, read_single_file

FAMILIES = ("sd1", "sd2", "sdxl")
EMPTY = torch.empty(0)


def add(*names: str) -> Callable[[dict[str, Tensor]], None]:
    """Return the change that adds empty tensors."""
    return lambda tensors: tensors.update(dict.fromkeys(names, EMPTY))


def remove(prefix: str) -> Callable[[dict[str, Tensor]], None]:
    """Return the change that removes all tensors whose key begins with `prefix`."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return change


HALF = {f"foreign.{i}": EMPTY for i in range(2000)}
REFUSALS: dict[str, tuple[str, Any, dict[str, str], str]] = {
    "EDM": ("sdxl", add("edm_vpred.sigma_max"), {}, r"it predicts v in the EDM form \(edm_vpred\)"),
    "Playground": ("sdxl", add("edm_mean", "edm_std"), {}, "Playground 2.5"),
    "refiner": ("sdxl", add("conditioner.embedders.0.model.text_projection"), {}, "it is the refiner of SDXL"),
    "no autoencoder": ("sd1", remove("first_stage_model."), {}, "holds no autoencoder .* --pretrained_vae_model_name"),
    "no text encoder": ("sd1", remove("cond_stage_model."), {}, "holds no text encoder"),
    "no first text encoder": ("sdxl", remove("conditioner.embedders.0."), {}, r"holds no conditioner.embedders.0"),
    "no UNet": ("sd2", remove("model.diffusion_model."), {}, "is not in the original layout of Stable Diffusion"),
    "half of the keys foreign": (
        "sd1",
        lambda tensors: tensors.update(HALF),
        {},
        "is not in the original layout of Stable Diffusion: 2000 of its .* keys are unknown, such as foreign",
    ),
    "text of another family": (
        "sd1",
        lambda tensors: tensors.update({key: torch.zeros(8, 12) for key in tensors if ".attn2.to_k.weight" in key}),
        {},
        "takes text of width 12, and that of SD1.x, whose text encoder the file holds, is 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_single_file_is_refused_in_one_line(write_file: Any, case: str) -> None:
    family, change, header, sentence = REFUSALS[case]
    path = write_file(family, change, header)
    with pytest.raises(ModelError, match=sentence) as caught:
        read_configs(str(path), ModelOptions())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_lora_file_is_not_taken_for_a_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_down.weight": EMPTY}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="is a LoRA file, and not a model"):
        read_single_file(tmp_path / "lora.safetensors")


# Published: 686 and 1680 tensors of the UNet, 248 of the autoencoder; 860, 866 and 2567 million parameters of the UNet.
PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
TEXT_PARAMETERS = {"sd1": (123_060_480,), "sd2": (340_387_840,), "sdxl": (123_060_480, 694_659_840)}
TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_of_a_family_gives_the_published_number_of_parameters(family: Any) -> None:
    table = family_table(family)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(table["unet"]), AutoencoderKL.from_config(table["vae"])
        encoders = [CLIPTextModel(CLIPTextConfig(**table["text_encoder"]))]
        if family == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**table["text_encoder_2"])))

    def count(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(unet) == PARAMETERS[family] and len(unet.state_dict()) == TENSORS[family]
    assert count(vae) == 83_653_863 and len(vae.state_dict()) == 248
    assert tuple(count(encoder) for encoder in encoders) == TEXT_PARAMETERS[family]
    classes = {
        "StableDiffusionPipeline": StableDiffusionPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    }
    parts = set(table) - {"model_index", "pad_tokens"} | set(table["pad_tokens"])
    index = table["model_index"]
    assert parts == {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert parts <= set(classes[index["_class_name"]].__init__.__annotations__)
    json.dumps(table)
