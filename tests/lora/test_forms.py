"""Files of peft's and kohya's forms from one set of updates, against the files that training writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2f_fast.errors import ModelError
from d2f_fast.files.tensor_file import write_tensors
from d2f_fast.lora.forms import layers_by_name, write_lora_form
from d2f_fast.lora.header import family_of_lora
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.kohya import kohya_header, kohya_state_dict
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.write import lora_state_dict
from d2f_fast.models.skeleton import Skeleton, skeleton_of_family

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="session")
def skeletons() -> dict[str, Skeleton]:
    return {family: skeleton_of_family(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def trained(make_family_unet: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the two LoRA files of a network of each family, with mixed ranks and a scale of 2."""
    folders = {}
    for family in FAMILIES:
        unet = make_family_unet(family)
        inject_lora(unet, 2, alpha=4, conv_rank=1, first_last_layers=True)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        folder = folders[family] = tmp_path_factory.mktemp(family)
        tensors, header = lora_state_dict(unet)  # `save_lora` writes the same, and reads it back, which takes longer.
        write_tensors(folder / "pytorch_lora_weights.safetensors", tensors, header)
        header = {"format": "pt"} | kohya_header(unet, tensors, family, "epsilon")
        write_tensors(folder / f"{family}_kohya.safetensors", kohya_state_dict(unet, tensors), header)
    return folders


def with_text(file: Path, family: str, folder: Path) -> Path:
    """Return a copy of a kohya file with layers of the text encoders."""
    tensors = load_file(file)
    for prefix in ("lora_te1", "lora_te2") if family == "sdxl" else ("lora_te",):
        for module, width in (("self_attn_q_proj", 6), ("mlp_fc1", 9)):
            name = f"{prefix}_text_model_encoder_layers_1_{module}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(3, 6)
            tensors[f"{name}.lora_up.weight"] = torch.randn(width, 3)
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, folder / "text_kohya.safetensors")
    return folder / "text_kohya.safetensors"


def same(got: Path, want: Path) -> None:
    """Assert that two files hold the same tensors."""
    first, second = load_file(got), load_file(want)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_to_kohya_to_peft_gives_the_files_of_training(
    family: str, trained: Any, skeletons: Any, tmp_path: Path
) -> None:
    peft, kohya = trained[family] / "pytorch_lora_weights.safetensors", trained[family] / f"{family}_kohya.safetensors"
    lora = read_lora(peft)
    assert family_of_lora(lora.about) == family_of_lora(read_lora(kohya).about) == family
    out = tmp_path / "out_kohya.safetensors"
    write_lora_form(out, layers_by_name(lora, skeletons[family]), "kohya", skeletons[family], title=family)
    same(out, kohya)
    with safe_open(out, framework="pt") as ours, safe_open(kohya, framework="pt") as theirs:
        assert ours.metadata() == theirs.metadata()

    back = tmp_path / "back.safetensors"
    write_lora_form(back, layers_by_name(read_lora(out), skeletons[family]), "peft", None, title="")
    same(back, peft)
    with safe_open(back, framework="pt") as ours, safe_open(peft, framework="pt") as theirs:
        assert ours.metadata() == theirs.metadata()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_come_back(family: str, trained: Any, skeletons: Any, tmp_path: Path) -> None:
    kohya = with_text(trained[family] / f"{family}_kohya.safetensors", family, tmp_path)
    networks = skeletons[family]
    write_lora_form(tmp_path / "peft.safetensors", layers_by_name(read_lora(kohya), networks), "peft", None, title="")
    keys = load_file(tmp_path / "peft.safetensors").keys()
    assert "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight" in keys
    assert ("text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_B.weight" in keys) == (family == "sdxl")
    layers = layers_by_name(read_lora(tmp_path / "peft.safetensors"), networks)
    write_lora_form(tmp_path / "kohya.safetensors", layers, "kohya", networks, title="")
    same(tmp_path / "kohya.safetensors", kohya)


def test_diffusers_loads_both_text_encoders_from_the_peft_file(trained: Any, skeletons: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    kohya = with_text(trained["sdxl"] / "sdxl_kohya.safetensors", "sdxl", tmp_path)
    networks = skeletons["sdxl"]
    out = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora_form(out, layers_by_name(read_lora(kohya), networks), "peft", None, title="")
    tensors, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert tensors.keys() == load_file(out).keys() and not alphas
    assert metadata["text_encoder_2.r"] == metadata["text_encoder_2.lora_alpha"] == 3


def test_half_precision_rounds_the_matrices_and_not_alpha(trained: Any, skeletons: Any, tmp_path: Path) -> None:
    layers = layers_by_name(read_lora(trained["sd1"]), skeletons["sd1"])
    out = tmp_path / "half.safetensors"
    write_lora_form(out, layers, "kohya", skeletons["sd1"], title="", dtype=torch.bfloat16, tags={"d2f.shift": "2.0"})
    types = {key.rpartition(".")[2]: tensor.dtype for key, tensor in load_file(out).items()}
    assert types == {"weight": torch.bfloat16, "alpha": torch.float32}
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["d2f.shift"] == "2.0"


def test_layer_of_another_model_is_refused(trained: Any, skeletons: Any) -> None:
    with pytest.raises(ModelError, match="is not a layer of this model: give the folder of the model"):
        layers_by_name(read_lora(trained["sdxl"]), skeletons["sd1"])


def test_kohya_file_of_an_unknown_model_needs_its_networks(trained: Any, tmp_path: Path) -> None:
    kohya = read_lora(trained["sd1"] / "sd1_kohya.safetensors")
    with pytest.raises(ModelError, match="do not show which model they are of: give its folder as --base_model"):
        layers_by_name(kohya, None)
    layers = layers_by_name(read_lora(trained["sd1"]), None)
    with pytest.raises(ModelError, match="give its folder as --base_model"):
        write_lora_form(tmp_path / "a.safetensors", layers, "kohya", None, title="")
