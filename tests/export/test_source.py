"""Tests of loading the exported model, with its own or another autoencoder."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    MarigoldDepthPipeline,
    UNet2DConditionModel,
)
from safetensors.numpy import save_file

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.folder import ExportJob, export_folder
from d2f_fast.export.options import ExportOptions
from d2f_fast.export.verify import open_session
from d2f_fast.models.marigold import settle_start


def test_tiny_autoencoder_takes_the_place_of_the_models_own(one_level_folder, tmp_path):
    torch.manual_seed(1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    tiny.save_pretrained(tmp_path / "taesd")
    folder = tmp_path / "out"
    options = {"model": str(one_level_folder), "vae": str(tmp_path / "taesd"), "output": str(folder)}
    report = export_folder(ExportOptions(**options, components="vae_encoder,vae_decoder"))
    assert max(row["rms"] for row in report["parity"]) <= 5e-6 and report["vae"] == "taesd"
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 24)).astype(np.float32)
    (latents,) = open_session(folder / "vae_encoder/model.onnx").run(["latent_sample"], {"sample": image})
    (decoded,) = open_session(folder / "vae_decoder/model.onnx").run(["sample"], {"latent_sample": latents})
    with torch.no_grad():
        want = tiny.encode(torch.from_numpy(image)).latents
        np.testing.assert_allclose(latents, want, atol=1e-5)
        np.testing.assert_allclose(decoded, tiny.decode(want).sample, atol=1e-5)


def test_autoencoder_of_another_model_is_refused(one_level_folder, tmp_path):
    for options, sentence in (
        ({"latent_channels": 16}, "has 16 latent channels, the UNet has 4: give one made for this model"),
        ({}, "has 8 pixels per latent, the model's own has 2: give one made for this model"),
    ):
        AutoencoderTiny(**options).save_pretrained(tmp_path / "other")
        with pytest.raises(RefusedInputError, match=f"autoencoder .*other {sentence}"):
            export_folder(ExportOptions(model=str(one_level_folder), vae=str(tmp_path / "other"), output="out"))
    UNet2DConditionModel.from_pretrained(one_level_folder / "unet").save_pretrained(tmp_path / "unet")
    with pytest.raises(RefusedInputError, match="unet is a UNet2DConditionModel: give an AutoencoderKL or an"):
        export_folder(ExportOptions(model=str(one_level_folder), vae=str(tmp_path / "unet"), output="out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedInputError, match=r"autoencoder .*/empty cannot be loaded \("):
        export_folder(ExportOptions(model=str(one_level_folder), vae=str(tmp_path / "empty"), output="out"))
    with pytest.raises(RefusedInputError, match=r"autoencoder .*/none does not exist: give a hub id, a folder or"):
        export_folder(ExportOptions(model=str(one_level_folder), vae=str(tmp_path / "none"), output="out"))


@pytest.mark.slow
def test_autoencoder_is_exported_with_reflection_padding(one_level_folder, tmp_path):
    options = {"model": str(one_level_folder), "output": str(tmp_path), "components": "vae_encoder,vae_decoder"}
    report = export_folder(ExportOptions(**options, vae_reflection_padding=True))
    assert max(row["rms"] for row in report["parity"]) <= 5e-6
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 24)).astype(np.float32)
    (latents,) = open_session(tmp_path / "vae_encoder/model.onnx").run(["latent_parameters"], {"sample": image})
    vae = AutoencoderKL.from_pretrained(one_level_folder, subfolder="vae")
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = "reflect"
    with torch.no_grad():
        want = vae.encode(torch.from_numpy(image)).latent_dist.parameters
    np.testing.assert_allclose(latents, want, atol=1e-5)
    assert json.loads((tmp_path / "vae_decoder/config.json").read_text())["reflection_padding"] is True


@pytest.fixture
def zeros_folder(marigold_folder, tmp_path):
    """Return a depth folder whose own files say that it starts from zeros, in one step."""
    pipeline = MarigoldDepthPipeline.from_pretrained(marigold_folder)
    settle_start(pipeline, was_zeros=False, from_zeros=True)
    pipeline.save_pretrained(tmp_path / "zeros")
    return tmp_path / "zeros"


@pytest.fixture
def depth_lora(tmp_path):
    """Return a function that writes a depth LoRA of the first layer with a start and a number of steps."""

    def write(start, steps):
        random = np.random.default_rng(0)
        shapes = {"A": (2, 8, 3, 3), "B": (16, 2, 1, 1)}
        tensors = {
            f"unet.conv_in.lora_{name}.weight": random.standard_normal(shape, np.float32)
            for name, shape in shapes.items()
        }
        tags = {"d2f.task": "depth", "d2f.start": start, "d2f.recommended_steps": str(steps)}
        save_file(tensors, tmp_path / f"{start}.safetensors", metadata=tags)
        return str(tmp_path / f"{start}.safetensors")

    return write


def test_model_that_jumps_from_zeros_is_exported_for_one_step(marigold_folder, zeros_folder, tmp_path):
    options = {"model": str(zeros_folder), "output": str(tmp_path / "out")}
    assert not ExportJob(ExportOptions(**options | {"model": str(marigold_folder)})).starts_from_zeros
    job = ExportJob(ExportOptions(**options))
    assert (job.starts_from_zeros, job.recommended_steps) == (True, 1)
    for given in ({"steps": "2,4"}, {"steps": "1", "unroll": 4}):
        with pytest.raises(
            RefusedInputError, match="zeros was trained to jump from zeros in one step: steps must hold 1"
        ):
            ExportJob(ExportOptions(**options, **given))


def test_lora_decides_how_an_exported_model_starts(marigold_folder, zeros_folder, depth_lora, tmp_path):
    output, more = tmp_path / "out", {"components": "text_encoder", "steps": "1,2", "skip_verify": True}
    zeros, noise = depth_lora("zeros", 1), depth_lora("noise", 2)
    for model, lora, from_zeros, steps in ((zeros_folder, noise, False, 2), (marigold_folder, zeros, True, 1)):
        job = ExportJob(options := ExportOptions(model=str(model), lora=(lora,), output=str(output), **more))
        assert (job.starts_from_zeros, job.recommended_steps) == (from_zeros, steps)
        assert job.model.pipeline.config.default_denoising_steps == steps
    assert export_folder(options)["start"] == json.loads((output / "export.json").read_text())["start"] == "zeros"
    assert json.loads((output / "model_index.json").read_text())["default_denoising_steps"] == 1
