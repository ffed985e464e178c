"""Autoencoders: another one in place of the model's own, and a scale and shift that every program respects."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.models.autoencoder import autoencoder_tags, load_autoencoder, other_autoencoder, set_scale_and_shift
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.options import ModelOptions


@pytest.fixture
def other(pipeline: Any) -> AutoencoderKL:
    """Another autoencoder of the tiny model's shape, with another scale."""
    torch.manual_seed(9)
    return AutoencoderKL.from_config({**pipeline.vae.config, "scaling_factor": 0.7}).eval()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Folder of a distilled autoencoder that fits the tiny model."""
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taesd")
    return tmp_path / "taesd"


def load(folder: Path, **options: Any) -> BaseModel:
    return BaseModel.load(folder, options=ModelOptions(**options))


def test_folder_of_an_autoencoder_or_a_pipeline_replaces_the_models_own(
    tiny_folder: Path, tmp_path: Path, other: AutoencoderKL, pipeline: Any
) -> None:
    other.save_pretrained(tmp_path / "vae")
    own = pipeline.vae
    pipeline.register_modules(vae=other)
    try:
        pipeline.save_pretrained(tmp_path / "pipeline")
    finally:
        pipeline.register_modules(vae=own)
    for source in (tmp_path / "vae", tmp_path / "pipeline"):
        model = load(tiny_folder, pretrained_vae_model_name_or_path=str(source))
        state = model.vae.state_dict()
        assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
        assert model.vae.config.scaling_factor == 0.7 and model.pipeline.vae is model.vae
        assert model.fingerprint("vae") != BaseModel.load(tiny_folder).fingerprint("vae")


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_single_file_of_an_autoencoder_takes_the_scale_of_the_models_own(
    narrow: Any, original: Any, tmp_path: Path, layout: str
) -> None:
    pipeline = narrow("sd1")
    state = pipeline.vae.state_dict()
    if layout == "original":
        prefix = "first_stage_model."
        tensors = {key.removeprefix(prefix): x for key, x in original("sd1").items() if key.startswith(prefix)}
    else:
        tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    found = load_autoencoder(str(tmp_path / "vae.safetensors"), torch.float32, pipeline.vae.config)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in state.items())
    assert found.config.scaling_factor == pipeline.vae.config.scaling_factor


def test_distilled_autoencoder_encodes_trains_and_generates(tiny_folder: Path, tiny: Path) -> None:
    model = load(tiny_folder, pretrained_vae_model_name_or_path=str(tiny))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.encode_images(pixels)
    with torch.no_grad():
        expected = model.vae.encode(pixels).latents
    assert torch.equal(posterior["mean"], expected) and not posterior["std"].any()
    assert model.decode(model.scale_latents(expected)).shape == pixels.shape
    pipeline: Any = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("ab", num_inference_steps=1, height=16, width=16).images[0].size == (16, 16)


@pytest.mark.parametrize("with_convolutions", [True, False])
def test_scale_and_shift_give_the_restated_latents_and_images(
    tiny_folder: Path, pipeline: Any, with_convolutions: bool
) -> None:
    own = AutoencoderKL.from_config(
        {**pipeline.vae.config, "use_quant_conv": with_convolutions, "use_post_quant_conv": with_convolutions}
    ).eval()
    own.load_state_dict(pipeline.vae.state_dict(), strict=False)
    ours = AutoencoderKL.from_config(own.config).eval()
    ours.load_state_dict(own.state_dict())
    set_scale_and_shift(ours, 0.1406, -0.4743)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior, shifted = own.encode(pixels).latent_dist, ours.encode(pixels).latent_dist
        torch.testing.assert_close(shifted.mean, posterior.mean + 0.4743, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shifted.std, posterior.std, rtol=1e-5, atol=1e-6)
        latents = (posterior.mean + 0.4743) * 0.1406
        images = ours.decode(latents / ours.config.scaling_factor).sample  # as every stock pipeline decodes
        expected = own.decode(latents / 0.1406 - 0.4743).sample
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert ours.config.scaling_factor == 0.1406 and not ours.config.get("shift_factor")


def test_shift_of_a_configuration_reaches_training_sampling_and_the_saved_pipeline(
    folder: Path, tmp_path: Path
) -> None:
    config = folder / "vae" / "config.json"
    plain = load(folder)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = (plain.encode_images(pixels)["mean"] - 0.3) * 0.5
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.3}))
    given = load(folder, vae_custom_shift=0.3)
    read = load(folder)
    for model in (read, given):
        latents = model.scale_latents(model.encode_images(pixels)["mean"])
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.decode(latents), plain.decode(latents + 0.3 * 0.5), rtol=1e-4, atol=1e-5)
    assert read.fingerprint("vae") == given.fingerprint("vae") != plain.fingerprint("vae")
    read.pipeline.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")  # The shift is in the weights, and is not applied a second time.
    assert again.fingerprint("vae") == read.fingerprint("vae")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    images = stock.image_processor.pt_to_numpy(
        (stock.vae.decode(expected / stock.vae.config.scaling_factor).sample.detach() / 2 + 0.5).clamp(0, 1)
    )
    shown = plain.decode(expected + 0.3 * 0.5)
    torch.testing.assert_close(torch.from_numpy(images), (shown / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def test_unusable_autoencoder_is_refused_in_one_line(tiny_folder: Path, tiny: Path, tmp_path: Path) -> None:
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "wide")
    AutoencoderTiny().save_pretrained(tmp_path / "deep")
    UNet2DConditionModel.from_pretrained(tiny_folder / "unet").save_pretrained(tmp_path / "unet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04")
    save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    kl = AutoencoderKL.from_pretrained(tiny_folder / "vae").state_dict()
    first = "decoder.conv_out.weight"
    save_file({key: value for key, value in kl.items() if key != first}, tmp_path / "lacking.safetensors")
    save_file(kl | {first: torch.zeros(3, 9, 3, 3)}, tmp_path / "other.safetensors")
    save_file(kl | {first: kl[first].to(torch.int8)}, tmp_path / "int8.safetensors")
    shutil.copytree(tiny_folder / "vae", tmp_path / "odd")
    save_file(kl | {first: torch.zeros(3, 9, 3, 3)}, tmp_path / "odd" / "diffusion_pytorch_model.safetensors")
    for name, sentence in (
        ("wide", "wide has 16 latent channels, the UNet has 4: give one made for this model"),
        ("deep", "deep has 8 pixels per latent, the model's own has 2: give one made for this model"),
        ("unet", "unet is a UNet2DConditionModel: give an AutoencoderKL or an AutoencoderTiny"),
        ("empty", r"empty cannot be loaded \("),
        ("none", "none does not exist: give a hub id, a folder or a .safetensors file"),
        ("none.safetensors", "none.safetensors: no such file; check the path"),
        ("x.ckpt", "is a pickle, which can run code"),
        ("x.safetensors", "holds no AutoencoderKL"),
        ("lacking.safetensors", rf"lacking.safetensors holds no weights for {first}: give an intact file"),
        ("other.safetensors", rf"{first} has shape \[3, 9, 3, 3\], and that of the model's own autoencoder is \[3, 8"),
        ("int8.safetensors", f"int8.safetensors: {first} is of type I8, which holds no weights"),
        ("odd", r"odd cannot be loaded \(Cannot load because .*torch.Size.{,20}\): give an intact autoencoder"),
    ):
        with pytest.raises(ModelError, match=sentence) as caught:
            load_pipeline(tiny_folder, options=ModelOptions(pretrained_vae_model_name_or_path=str(tmp_path / name)))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"AutoencoderTiny has no place for a shift of 0\.5"):
        load(tiny_folder, pretrained_vae_model_name_or_path=str(tiny), vae_custom_shift=0.5)


def test_sampling_says_that_a_lora_was_trained_with_another_autoencoder(tiny: Path) -> None:
    options = {"pretrained_vae_model_name_or_path": str(tiny), "vae_custom_scale": 0.1406, "vae_custom_shift": -0.5}
    trained = ModelOptions(**options)  # type: ignore[arg-type]
    tags = autoencoder_tags(trained)
    assert tags == {"d2f.vae": tiny.name, "d2f.vae_scale": "0.1406", "d2f.vae_shift": "-0.5"}
    assert autoencoder_tags(ModelOptions(pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix")) == {
        "d2f.vae": "madebyollin/sdxl-vae-fp16-fix"
    }
    assert other_autoencoder(tags, trained) is None and other_autoencoder({}, ModelOptions()) is None
    assert other_autoencoder(tags, replace(trained, vae_custom_scale=None)) == (
        "the LoRA was trained with --vae_custom_scale 0.1406: give the same, unless the model itself has this"
        " autoencoder"
    )


def test_single_file_without_an_autoencoder_takes_the_one_that_is_named(
    write_file: Any, narrow: Any, tokenizer: str, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("first_stage_model.")]:
            del tensors[key]

    vae = narrow("sd1").vae
    vae.save_pretrained(tmp_path / "vae")
    options = {"tokenizer_name_or_path": tokenizer, "pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    pipeline: Any = load_pipeline(write_file("sd1", change), options=ModelOptions(**options))  # type: ignore[arg-type]
    state = pipeline.vae.state_dict()
    assert all(torch.equal(state[key], value) for key, value in vae.state_dict().items())
