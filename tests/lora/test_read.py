"""LoRA files of every form, read into the matrices and the alpha of each layer."""

import json

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import CheckpointError, ModelError
from d2f_fast.lora.read import KOHYA_ENDING, LORA_FILE, lora_path, lora_tags, read_lora

DOWN, UP = torch.randn(2, 6), torch.randn(5, 2)
FORMS = {
    "peft": ("unet.a.b", "lora_A.weight", "lora_B.weight"),
    "peft with adapter name": ("unet.a.b", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": ("unet.a.b", "lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_unet_a_b", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_matrices_and_alpha(form, alpha, tmp_path):
    name, down, up = FORMS[form]
    tensors = {f"{name}.{down}": DOWN.half(), f"{name}.{up}": UP.half()}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / LORA_FILE, {"d2f.shift": "3.0", "format": "pt"})
    for source in (tmp_path, tmp_path / LORA_FILE):
        lora = read_lora(source)
        assert lora.path == lora_path(source) == tmp_path / LORA_FILE
        assert lora.header == {"d2f.shift": "3.0", "format": "pt"}
        ((found, layer),) = lora.layers.items()
        assert (found, layer.rank, layer.alpha) == (name, 2, 2.0 if alpha is None else alpha)
        assert torch.equal(layer.down, DOWN.half().float()) and torch.equal(layer.up, UP.half().float())
        torch.testing.assert_close(layer.delta(), layer.alpha / 2 * (layer.up @ layer.down))
        assert lora_tags(source) == {"d2f.shift": "3.0"}


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"unet.lora_alpha": 4}, 4.0),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"b": 8}}, 8.0),
        ({"unet.lora_alpha": 4, "unet.use_rslora": True}, 4 * 2**0.5),
        ({"text_encoder.lora_alpha": 4}, 2.0),
    ],
    ids=["alpha", "pattern", "rslora", "other component"],
)
def test_alpha_comes_from_the_header_of_a_peft_file(metadata, alpha, tmp_path):
    tensors = {"unet.a.b.lora_A.weight": DOWN, "unet.a.b.lora_B.weight": UP}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    assert read_lora(tmp_path / "x.safetensors").layers["unet.a.b"].alpha == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("[1]", "lora_adapter_metadata in its header is not a JSON object: save the LoRA again"),
        ('{"unet', "lora_adapter_metadata in its header is not a JSON object"),
        ('{"unet.lora_alpha": "a"}', "lora_alpha or alpha_pattern of unet in its header is not a number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "lora_alpha or alpha_pattern of unet"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"conv_in": [2]}}', "lora_alpha or alpha_pattern of unet"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "lora_alpha or alpha_pattern of unet"),
    ],
)
def test_header_without_a_usable_scale_is_refused(header, sentence, tmp_path):
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 1)}
    save_file(tensors, tmp_path / "peft.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(ModelError, match=rf"peft\.safetensors: {sentence}"):
        read_lora(tmp_path / "peft.safetensors")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, r"x\.safetensors holds no tensors: only LoRA files of peft and kohya can be read"),
        ({"a.hada_w1_a": DOWN}, r"a\.hada_w1_a is not a LoRA weight: only LoRA files of peft and kohya can be read"),
        ({"a.lora_up.weight": UP}, "a lacks one of its two matrices: the file is incomplete"),
        (
            {"a.lora_up.weight": UP, "a.lora_down.weight": DOWN[:1]},
            r"matrices of a, \[5, 2\] and \[1, 6\], have no rank",
        ),
        (
            {"a.lora_up.weight": UP[:, :0], "a.lora_down.weight": DOWN[:0]},
            "have no rank in common: the file is damaged",
        ),
        ({"a.lora_up.weight": UP[0], "a.lora_down.weight": DOWN}, "have no rank in common: the file is damaged"),
        (
            {"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "a.alpha": torch.ones(2)},
            "the alpha of a is not a single number: the file is damaged",
        ),
    ],
)
def test_unusable_file_is_refused_by_name(tensors, sentence, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=sentence) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_other_file_formats_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"x\.ckpt is not safetensors, other formats can run code"):
        read_lora(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"{LORA_FILE}: no such file; check the path"):
        read_lora(tmp_path)


def test_folder_gives_its_diffusers_file_first_and_else_its_only_kohya_file(tmp_path):
    kohya, diffusers = tmp_path / f"run{KOHYA_ENDING}", tmp_path / LORA_FILE
    kohya.touch()
    assert lora_path(tmp_path) == kohya
    (tmp_path / f"other{KOHYA_ENDING}").touch()
    assert lora_path(tmp_path) == diffusers
    diffusers.touch()
    assert lora_path(tmp_path) == diffusers
