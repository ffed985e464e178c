"""The base model: frozen parts, conditions and latents as the pipeline makes them, and fingerprints."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from transformers import CLIPTokenizer

from d2f_fast.errors import ModelError
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.configs import MINIATURE_FOLDER
from d2f_fast.models.options import ModelOptions


def test_pipeline_without_a_conditional_unet_is_refused(tmp_path: Path, pipeline: Any) -> None:
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    with pytest.raises(ModelError, match="DDPMPipeline has no UNet2DConditionModel: give a Stable Diffusion pipeline"):
        BaseModel(DDPMPipeline(unet, pipeline.scheduler))


def test_folder_loads_frozen_with_the_weights_of_diffusers(model: BaseModel, pipeline: Any) -> None:
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(model.pipeline, name).state_dict(), getattr(pipeline, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for frozen in (model.vae, model.pipeline.text_encoder):
        assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    assert model.alignment.prediction_type == "epsilon"


def test_model_is_loaded_in_the_given_type(tiny_folder: Path) -> None:
    loaded = BaseModel.load(tiny_folder, torch.bfloat16)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_prompts_are_encoded_as_the_pipeline_does(model: BaseModel, pipeline: Any) -> None:
    prompts = ["a b", "", "a text with more letters than the model has places for"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    encoded = model.encode_prompts(prompts)
    assert list(encoded) == ["encoder_hidden_states"] and torch.equal(encoded["encoder_hidden_states"], expected)


def test_images_are_encoded_and_decoded_as_the_autoencoder_does(model: BaseModel, pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.encode_images(pixels)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist
        latents = model.scale_latents(posterior["mean"])
        assert torch.equal(posterior["mean"], expected.mean) and torch.equal(posterior["std"], expected.std)
        torch.testing.assert_close(latents, expected.mean * 0.5, rtol=1e-6, atol=0)
        torch.testing.assert_close(model.decode(latents), pipeline.vae.decode(expected.mean).sample)
    assert posterior["mean"].shape == (2, 4, 16 // model.downsampling, 16 // model.downsampling)


def test_sdxl_receives_the_size_of_an_uncropped_image(model: BaseModel) -> None:
    assert model.added_cond_kwargs({"encoder_hidden_states": torch.zeros(2, 8, 16)}, 16, 24) is None
    added = model.added_cond_kwargs({"text_embeds": torch.zeros(2, 6)}, 16, 24)
    assert added is not None and added["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2


def test_fingerprint_depends_on_the_model_and_not_on_its_location(
    model: BaseModel, folder: Path, tiny_folder: Path
) -> None:
    copy = BaseModel.load(folder)
    for names in (("vae",), ("text_encoder", "text_encoder_2", "tokenizer")):
        fingerprint = model.fingerprint(*names)
        assert re.fullmatch(r"[0-9a-f]{64}", fingerprint)
        assert copy.fingerprint(*names) == fingerprint
    before = [copy.fingerprint("vae"), copy.fingerprint("text_encoder")]
    with torch.no_grad():
        copy.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert copy.fingerprint("vae") != before[0] and copy.fingerprint("text_encoder") == before[1]
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.25}))
    assert BaseModel.load(folder).fingerprint("vae") != before[0]


def test_fingerprint_covers_the_tokenizer(model: BaseModel, folder: Path) -> None:
    path = next((folder / "tokenizer").glob("tokenizer.json"))
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    changed = BaseModel.load(folder)
    assert changed.fingerprint("text_encoder") == model.fingerprint("text_encoder")
    assert changed.fingerprint("tokenizer") != model.fingerprint("tokenizer")
    # The same vocabulary, with other merges and with other padding.
    shutil.copytree(MINIATURE_FOLDER / "tokenizer", folder / "own")
    merges = folder / "own" / "merges.txt"
    found = []
    for direction in (1, -1):
        version, *lines = merges.read_text().splitlines()
        merges.write_text("\n".join([version, *lines[::direction]]))
        changed.pipeline.tokenizer = CLIPTokenizer.from_pretrained(folder / "own")
        found.append(changed.fingerprint("tokenizer"))
    changed.pipeline.tokenizer.pad_token = "!"
    assert len({*found, changed.fingerprint("tokenizer")}) == 3


def test_flow_of_a_network_that_predicts_the_flow_has_no_alignment(flow_xl: Any) -> None:
    model = BaseModel(flow_xl)
    assert (model.flow.prediction_type, model.facts.prediction_type) == ("flow_prediction", "flow_prediction")
    assert str(model.facts).endswith(", flow prediction (the pipeline's scheduler)")
    assert model.to("cpu").flow.timestep(torch.tensor(0.25)).item() == 750
    with pytest.raises(ModelError, match=r"the network predicts the flow itself \(flow_prediction\) and has no align"):
        _ = model.alignment


def test_flow_matching_scheduler_and_option_make_a_flow_model(flow_xl: Any) -> None:
    flow_xl.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert BaseModel(flow_xl).flow.prediction_type == "flow_prediction"
    # An option that states a diffusion prediction comes with the noise table of Stable Diffusion.
    alignment = BaseModel(flow_xl, ModelOptions(prediction_type="epsilon")).alignment
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert alignment.prediction_type == "epsilon"
    assert alignment.schedule.alphas_cumprod[-1].item() == pytest.approx((1 - betas).prod().item(), rel=1e-4)
    flow_xl.scheduler = DDIMScheduler()
    model = BaseModel(flow_xl, ModelOptions(prediction_type="flow_prediction"))
    assert isinstance(model.flow, NaiveFlow)
    assert str(model.facts).endswith(", flow prediction (option --prediction_type)")
