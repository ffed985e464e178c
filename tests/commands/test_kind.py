"""What a path holds, from names and headers alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from d2f_fast.commands.kind import kind_of
from d2f_fast.errors import ModelError, RefusedInputError


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("unet.conv_in.lora_A.weight", "LoRA"),
        ("unet.conv_in.lora_A.default.weight", "LoRA"),
        ("lora_unet_conv_in.lora_down.weight", "LoRA"),
        ("unet.a.processor.to_q_lora.down.weight", "LoRA"),
        ("lora_unet_conv_in.hada_w1_a", "LoRA"),
        ("model.diffusion_model.out.2.weight", "model file"),
        ("conv_in.weight", "unknown file"),
    ],
)
def test_kind_of_a_file_is_seen_from_its_keys(key: str, kind: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(1)}, tmp_path / "a.safetensors")
    assert kind_of(tmp_path / "a.safetensors") == kind


def test_kind_of_a_folder_is_seen_from_its_files(tiny_folder: Path, tmp_path: Path, adapted: Any) -> None:
    assert kind_of(tiny_folder) == "model folder"
    assert kind_of(adapted[1]["peft"]) == "LoRA"
    for name in ("run/log.jsonl", "full/pipeline/model_index.json", "begun/checkpoint-3/a"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    assert {kind_of(tmp_path / name) for name in ("run", "full", "begun")} == {"run"}
    for kind, files in (
        ("export", ("export.json", "model_index.json")),
        ("checkpoint", ("manifest.json", "state.json", "a.safetensors")),
        ("pairs", ("pairs.json", "000000.tar")),
    ):
        (tmp_path / f"a {kind}").mkdir()
        for name in files:
            (tmp_path / f"a {kind}" / name).write_text("{}")
        assert kind_of(tmp_path / f"a {kind}") == kind
    (tmp_path / "cache/0f").mkdir(parents=True)
    (tmp_path / "cache/0f/0f3.safetensors").write_bytes(b"")
    assert kind_of(tmp_path / "cache") == "cache"
    (tmp_path / "images/10_cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/10_cat/a.PNG")
    assert kind_of(tmp_path / "images") == "data set"


def test_pickle_and_folder_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.ckpt is a pickle, which can run code: convert it to safetensors first"):
        kind_of(tmp_path / "a.ckpt")
    with pytest.raises(
        RefusedInputError, match="holds neither a model, a LoRA, a cache, a run, pairs, an export nor images"
    ):
        kind_of(tmp_path)


def test_looking_imports_no_torch() -> None:
    code = "import sys, d2f_fast.commands.kind; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
