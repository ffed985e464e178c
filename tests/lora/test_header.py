"""What the header of a LoRA file says, against the file that is read whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.lora.header import common_family, family_of_lora, read_lora_header
from d2f_fast.lora.read import read_lora

FORMS = ("peft", "kohya sgm", "diffusion_model", "rslora", "dora", "loha with cores", "lokr", "lokr in four")


@pytest.mark.parametrize("form", FORMS)
def test_header_has_names_shapes_and_ranks_of_the_updates(
    form: str, unet: Any, tmp_path: Path, write_form: Any
) -> None:
    path, _ = write_form(form, unet, tmp_path)
    header, lora = read_lora_header(path), read_lora(path)
    found = {name: layer.shape for name, layer in header.layers.items()}
    assert found == {name: (*layer.shape, layer.as_lora().rank) for name, layer in lora.layers.items()}
    assert all(layer.is_dora == (form == "dora") for layer in header.layers.values())


def lora_of_width(path: Path, width: int, name: str = "x.attn2.to_k", **header: str) -> Path:
    tensors = {f"unet.{name}.lora_A.weight": torch.ones(1, width), f"unet.{name}.lora_B.weight": torch.ones(2, 1)}
    save_file(tensors, path, header or None)
    return path


def test_lora_of_two_families_have_none_in_common(tmp_path: Path) -> None:
    first, second = (read_lora_header(lora_of_width(tmp_path / f"{width}.safetensors", width)) for width in (768, 2048))
    named = read_lora_header(lora_of_width(tmp_path / "a.safetensors", 5, "y", ss_base_model_version="sdxl_base_v1-0"))
    assert [family_of_lora(each) for each in (first, second, named)] == ["sd1", "sdxl", "sdxl"]
    assert common_family([second, named]) == "sdxl"
    with pytest.raises(ModelError, match=r"of different families \(.*768.safetensors sd1, .*2048.safetensors sdxl\)"):
        common_family([first, second])
