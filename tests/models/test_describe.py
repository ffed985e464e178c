"""What a description says of model folders and single files, and what other programs trip over in them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_fast.models.convert import read_model, write_single_file
from d2f_fast.models.describe import describe_model_file, describe_model_folder


@pytest.fixture
def folder(narrow_pipeline: Any, tmp_path: Path) -> Path:
    """The narrow model of SD2.x in a folder that a test may damage."""
    return Path(shutil.copytree(narrow_pipeline("sd2"), tmp_path / "model"))


def test_folder_says_what_its_configuration_says(narrow_pipeline: Any) -> None:
    found = describe_model_folder(narrow_pipeline("sd2"))
    assert found["kind"] == "diffusers folder (StableDiffusionPipeline)"
    assert found["family"] == "SD2.x" and found["size of its images"] == "512 pixels"
    assert found["prediction type"] == "v_prediction (scheduler_config.json)"
    assert found["types"] == {"unet": "F32", "vae": "F32", "text_encoder": "F32"}
    unet = load_file(narrow_pipeline("sd2") / "unet" / "diffusion_pytorch_model.safetensors")
    assert found["parameters"]["unet"] == sum(tensor.numel() for tensor in unet.values())
    assert describe_model_folder(narrow_pipeline("sdxl"))["family"] == "SDXL"


def test_size_that_a_folder_was_trained_on_is_that_of_its_images(folder: Path) -> None:
    (folder / "d2f.json").write_text(json.dumps({"d2f.resolution": "48x64"}))
    assert describe_model_folder(folder)["size of its images"] == "48x64 pixels (d2f.json)"


def test_default_of_the_scheduler_is_named_as_such(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"_class_name": config["_class_name"]}))
    found = describe_model_folder(folder)
    assert found["prediction type"] == "epsilon (default of DDIMScheduler)"
    assert found["zero terminal SNR"] == "no (default of DDIMScheduler)"


def test_what_programs_trip_over_in_a_folder_is_named(folder: Path) -> None:
    encoder = folder / "text_encoder" / "model.safetensors"
    save_file({"text_model.a": torch.ones(1)}, encoder)
    before = describe_model_folder(folder)["odd"]
    save_file({"a": torch.ones(1)}, encoder)
    (folder / "tokenizer" / "vocab.json").unlink(missing_ok=True)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "a.bin")
    unet = folder / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"in_channels": 9}))
    odd = "\n".join(describe_model_folder(folder)["odd"])
    assert "the keys of text_encoder/ lack text_model." in odd and "lack text_model." not in "\n".join(before)
    assert "tokenizer/ lacks vocab.json" in odd
    assert "vae/ holds only a pickle (a.bin)" in odd
    assert "the UNet takes 9 channels" in odd


def test_whole_numbers_in_place_of_weights_are_odd(folder: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    odd = describe_model_folder(folder)["odd"]
    assert "1 weights are of type I8, which no loader reads, such as a" in odd


def test_single_file_says_what_it_is_taken_for(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_single_file(read_model(str(folder)), path, torch.float16)
    found = describe_model_file(path)
    assert found["family"] == "SD2.x" and found["prediction type"] == "v_prediction (marker v_pred)"
    assert found["zero terminal SNR"].startswith("no (")
    assert found["types"] == {"unet": "F16", "vae": "F16", "text encoder": "F16"}
    assert found["entries"]["modelspec.prediction_type"] == "v" and found["odd"] == []


def test_what_programs_trip_over_in_a_single_file_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_single_file(read_model(str(folder)), path)
    tensors = load_file(path)
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.diffusion_model.")}
    average = {"model_ema.diffusion_modelout2weight": torch.ones(1)}
    odd_text = {"cond_stage_model.transformer.embeddings.token_embedding.weight": torch.ones(1, 1)}
    save_file(unet | average | odd_text | {"strange.key": torch.ones(1)}, path)
    odd = "\n".join(describe_model_file(path)["odd"])
    assert "keys are foreign, such as strange.key" in odd
    assert "moving average" in odd and "lack text_model." in odd
    save_file(unet, path)
    assert "it cannot be loaded" in "\n".join(describe_model_file(path)["odd"])


def test_describing_a_folder_imports_no_torch(tiny_folder: Path) -> None:
    code = (
        "import sys, pathlib, d2f_fast.models.describe as d; d.describe_model_folder(pathlib.Path(sys.argv[1]));"
        " assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_folder)], check=True, timeout=600)
