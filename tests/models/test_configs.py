"""What is refused of a model by its names, configurations and headers, without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.configs import ModelConfigs, check_training, downsampling_of, read_configs, resolution_of
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.options import ModelOptions

SD = ModelConfigs({"sample_size": 64, "in_channels": 4}, {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4})


@pytest.mark.parametrize("model", ["miniature", "tiny", "sdxl"])
def test_size_equals_that_of_the_loaded_model(model: str, tiny_folder: Path, narrow_pipeline: Any) -> None:
    folder = {"tiny": tiny_folder}.get(model) or (narrow_pipeline(model) if model == "sdxl" else model)
    configs = read_configs(str(folder), ModelOptions())
    assert configs is not None
    loaded = BaseModel(load_pipeline(folder))
    assert downsampling_of(configs.vae) == loaded.downsampling
    assert resolution_of(configs.unet, loaded.downsampling) == loaded.resolution


@pytest.mark.parametrize(
    ("unet", "resolution", "sentence"),
    [
        ({}, 500, "resolution must be a multiple of 8, got 500"),
        ({"sample_size": None}, None, "resolution: the UNet's configuration has sample_size None: give --resolution"),
        ({"in_channels": 9}, None, "the UNet takes 9 channels and the autoencoder makes 4"),
        ({"num_class_embeds": 3}, None, "the UNet has num_class_embeds 3, an input that text-to-image"),
    ],
    ids=str,
)
def test_model_that_cannot_be_trained_is_refused(unet: dict[str, Any], resolution: int | None, sentence: str) -> None:
    check_training(SD, None)
    check_training(SD, 520)
    with pytest.raises(RefusedInputError, match="resolution must be a multiple of 8, got 36"):
        check_training(SD._replace(vae={**SD.vae, "block_out_channels": (8, 8, 8)}), 36)  # Latents of 4 pixels.
    check_training(SD._replace(unet={"sample_size": None, "in_channels": 4}), 512)
    with pytest.raises(RefusedInputError, match=sentence):
        check_training(SD._replace(unet={**SD.unet, **unet}), resolution)


def test_folder_that_cannot_be_loaded_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"unet/config\.json is not a JSON object"):
        read_configs(str(folder), ModelOptions())
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        read_configs(str(folder), ModelOptions())


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("vae.ckpt", r"vae\.ckpt is a pickle"),
        ("./nothing", "autoencoder nothing does not exist|autoencoder ./nothing does not exist"),
        ("nothing.safetensors", r"autoencoder nothing\.safetensors: no such file"),
    ],
)
def test_autoencoder_that_cannot_be_loaded_is_refused(source: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        read_configs("miniature", ModelOptions(pretrained_vae_model_name_or_path=source))


def test_hub_id_is_checked_only_where_nothing_may_be_downloaded() -> None:
    with pytest.raises(ModelError, match="no-one/nothing is neither a folder nor in the hub's cache"):
        read_configs("no-one/nothing", ModelOptions())
    code = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "0"
from d2f_fast.models.configs import read_configs
from d2f_fast.models.options import ModelOptions
assert read_configs("no-one/nothing", ModelOptions()) is None
assert read_configs("miniature", ModelOptions()).unet["sample_size"] == 8
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


def test_configuration_of_the_miniature_is_that_of_its_folder() -> None:
    configs = read_configs("miniature", ModelOptions())
    assert configs is not None
    pipeline = load_pipeline("miniature")
    assert json.loads(json.dumps(dict(configs.unet)))["in_channels"] == pipeline.unet.config.in_channels
