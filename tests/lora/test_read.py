"""LoRA files of every form, read into the update of each layer, and unusable ones refused in one line."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2f_fast.errors import CheckpointError, ModelError
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.source import LORA_FILE, PEFT_FILE, lora_path
from d2f_fast.lora.tags import lora_tags

DOWN, UP = torch.randn(2, 6), torch.randn(5, 2)
HOSTILE = Path(__file__).parent / "hostile"
FORMS = {
    "peft": ("unet.a.b", "lora_A.weight", "lora_B.weight"),
    "peft with adapter name": ("unet.a.b", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": ("unet.a.b", "lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_unet_a_b", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("alpha", [None, 3.0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_matrices_and_alpha(form: str, alpha: float | None, tmp_path: Path) -> None:
    name, down, up = FORMS[form]
    tensors = {f"{name}.{down}": DOWN.half(), f"{name}.{up}": UP.half()}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / LORA_FILE, {"d2f.shift": "3.0", "format": "pt"})
    for source in (tmp_path, tmp_path / LORA_FILE):
        lora = read_lora(source)
        assert lora.path == lora_path(source) == tmp_path / LORA_FILE
        assert lora.header == {"d2f.shift": "3.0", "format": "pt"}
        ((found, read),) = lora.layers.items()
        layer = read.as_lora()
        assert (found, layer.rank, layer.alpha) == (name, 2, 2.0 if alpha is None else alpha)
        assert torch.equal(layer.down, DOWN.half().float()) and torch.equal(layer.up, UP.half().float())
        assert lora.stems == {name: name} and lora_tags(source) == {"d2f.shift": "3.0"}


def test_folder_of_peft_is_read_with_its_configuration(tmp_path: Path) -> None:
    name = "base_model.model.conv_in"
    save_file({f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP}, tmp_path / PEFT_FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "alpha_pattern": {}, "rank_pattern": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (found,) = read_lora(tmp_path).layers.items()
    assert found[0] == "unet.conv_in" and found[1].as_lora().alpha == 5
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(ModelError, match=r"conv_in has rank 2, and adapter_config\.json says 4: the file is damaged"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT"}))
    with pytest.raises(ModelError, match=r"adapter_config\.json says OFT, which is not read: merge it with peft first"):
        read_lora(tmp_path)


A, B = "a.lora_down.weight", "a.lora_up.weight"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, r"x\.safetensors holds no tensors: give a LoRA file of peft, diffusers, kohya or LyCORIS"),
        (
            {"a.w": DOWN},
            r"a\.w is not a LoRA weight: only LoRA files of peft, diffusers, kohya and LyCORIS can be read",
        ),
        ({A: DOWN, B: UP, "b.oft_blocks": DOWN}, r"2 of 3 keys can be read; b\.oft_blocks is a key of OFT"),
        ({B: UP}, "a lacks one of its two matrices: the file is incomplete"),
        ({"a.hada_w1_a": UP}, "a: 'hada_w1_b' is missing: the file is damaged"),
        ({A: DOWN, B: UP, "a.hada_w1_a": UP}, "a lacks one of its two matrices"),
        ({A: DOWN[:1], B: UP}, r"a: the matrices \[5, 2\] and \[1, 6\] have no rank in common: the file is damaged"),
        ({A: DOWN[:0], B: UP[:, :0]}, "have no rank in common: the file is damaged"),
        ({A: DOWN, B: UP[0]}, "have no rank in common: the file is damaged"),
        ({A: DOWN, B: UP, "a.alpha": torch.ones(2)}, r"the alpha of a is \[2\], not a single number"),
        ({A: DOWN, B: UP, "a.alpha": torch.ones(0)}, r"the alpha of a is \[0\], not a single number"),
        ({A: DOWN, B: UP, "a.alpha": torch.tensor(0.0)}, "the alpha of a is 0, not a number up to 1e"),
        ({A: DOWN, B: UP, "a.alpha": torch.tensor(1e30)}, "the alpha of a is 1e"),
        ({A: DOWN, B: UP, "a.alpha": torch.tensor(float("nan"))}, r"a\.alpha holds NaN or infinity"),
        ({A: DOWN, B: UP * torch.inf}, r"a\.lora_up\.weight holds NaN or infinity: take an earlier save"),
        ({A: DOWN, B: UP.to(torch.complex64)}, r"a\.lora_up\.weight holds numbers of type C64, not real ones"),
        ({A: DOWN, B: UP.to(torch.int32)}, r"a\.lora_up\.weight holds numbers of type I32, not real ones"),
        (
            {A: DOWN, B: UP, "a.alpha": torch.tensor(1.0), "b.lora_down.weight": DOWN, "b.lora_up.weight": UP},
            "b has no alpha, and 1 of 2 layers have one: the file is incomplete",
        ),
        (
            {"unet.conv_in.lora_A.weight": DOWN, "conv_in.lora_A.weight": DOWN},
            r"lora_A\.weight gives unet\.conv_in a second time: give one LoRA in a file",
        ),
        ({"a\nb": DOWN}, r"'a\\nb' is not a LoRA weight"),
    ],
)
def test_unusable_file_is_refused_by_name(tensors: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ModelError, match=sentence) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_foreign_keys_of_a_kohya_file_are_named(tmp_path: Path) -> None:
    kohya = {
        "lora_unet_x.lora_down.weight": DOWN,
        "lora_unet_x.lora_up.weight": UP,
        "lora_unet_x.alpha": torch.ones(()),
    }
    foreign = {"mind.lora_down.weight": DOWN.clone(), "mind.lora_up.weight": UP.clone()}
    save_file(kohya | foreign, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors: mind is a foreign key, of no layer of Stable Diffusion"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lora_regex_hang", "is a regular expression other than a name"),
        ("lora_rank_0", "have no rank in common: the file is damaged"),
    ],
)
def test_hostile_file_is_refused_at_once(name: str, sentence: str) -> None:
    started = time.process_time()
    with pytest.raises(ModelError, match=sentence) as caught:
        read_lora(HOSTILE / f"{name}.safetensors")
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert time.process_time() - started < 1


def test_other_file_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(ModelError, match=r"x\.ckpt is not safetensors, other formats can run code"):
        read_lora(tmp_path / "x.ckpt")
    for read in (read_lora, lora_tags):
        with pytest.raises(CheckpointError, match=r"nope: there is no such file or folder; check the path"):
            read(tmp_path / "nope")


def test_copied_part_of_a_file_is_refused(tmp_path: Path) -> None:
    save_file({A: DOWN, B: UP}, tmp_path / "whole.safetensors")
    shutil.copy(tmp_path / "whole.safetensors", tmp_path / "part.safetensors")
    with (tmp_path / "part.safetensors").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(CheckpointError, match=r"part\.safetensors: not an intact safetensors file"):
        read_lora(tmp_path / "part.safetensors")
