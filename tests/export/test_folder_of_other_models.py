"""Tests of the export of models other than Stable Diffusion 1.5: depth, SDXL, SD2 and pipelines of the trainer."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    MarigoldDepthPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from d2f_fast import AlignedTrainer, Diff2FlowScheduler, TrainingConfig
from d2f_fast.commands.main import main
from d2f_fast.errors import RefusedInputError
from d2f_fast.export.depth_inference import OnnxDepthPipeline
from d2f_fast.export.folder import ExportJob, export_folder
from d2f_fast.export.inference import OnnxPipeline
from d2f_fast.export.options import ExportOptions


def _session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / f"{name}/model.onnx")


def test_sdxl_pipeline_takes_pooled_text_and_sizes(tiny_xl, tmp_path):
    folder, pipeline = tmp_path / "out", tiny_xl
    pipeline.save_pretrained(tmp_path / "model")
    components = "unet,text_encoder,vae_decoder,sampler"
    options = {"model": str(tmp_path / "model"), "output": str(folder), "static": "1x16x16", "steps": "2"}
    report = export_folder(ExportOptions(**options, components=components))
    assert max(row["rms"] for row in report["parity"]) <= 1e-5
    assert {row["graph"].split("/")[0] for row in report["parity"]} >= {"text_encoder", "text_encoder_2"}
    session = onnxruntime.InferenceSession(folder / "unet/sampler.onnx")
    added = ("text_embeds", "time_ids")
    names = {value.name for value in session.get_inputs()}
    assert names >= {*added, *(f"negative_{name}" for name in added)}
    # The images must be those of diffusers: prompts, pooled text, sizes and the zeros of the empty prompt take part.
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    size = {"height": 16, "width": 16}
    want = pipeline("ab", num_inference_steps=2, guidance_scale=3.0, latents=torch.from_numpy(noise), **size)
    (got,) = OnnxPipeline(folder)(["ab"], steps=2, guidance_scale=3.0, noise=noise, **size)
    assert np.abs(np.asarray(got, np.int16) - np.asarray(want.images[0], np.int16)).max() <= 1


@pytest.mark.slow
def test_sdxl_pipeline_in_half_precision(tiny_xl, tmp_path):
    tiny_xl.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "static": "1x16x16", "steps": "2"}
    report = export_folder(ExportOptions(**options, precision="fp16", components="unet,sampler"))
    assert max(row["rms"] for row in report["parity"]) <= 3e-3
    # Sizes in pixels must not be rounded: above 2048 float16 has no odd numbers.
    session = _session(tmp_path / "out", "unet")
    given = {"sample": np.zeros((2, 4, 8, 8), np.float32), "timestep": np.asarray(500, np.float32)}
    given |= {"encoder_hidden_states": np.zeros((2, 8, 32), np.float32), "text_embeds": np.zeros((2, 12), np.float32)}
    outputs = []
    for side in (4096, 4097):
        (output,) = session.run(None, given | {"time_ids": np.full((2, 6), side, np.float32)})
        outputs.append(output)
    assert not np.array_equal(*outputs)


@pytest.fixture
def marigold(one_level_folder, tmp_path):
    """Return a depth pipeline in Marigold's layout, and save it in model/."""
    base = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipeline = MarigoldDepthPipeline(
        unet=UNet2DConditionModel.from_config(dict(base.unet.config) | {"in_channels": 8}),
        vae=base.vae,
        scheduler=DDIMScheduler.from_config(base.scheduler.config, prediction_type="v_prediction"),
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        prediction_type="depth",
        default_denoising_steps=2,
        default_processing_resolution=0,
    )
    pipeline.save_pretrained(tmp_path / "model")
    return pipeline


def test_sampler_of_an_inpainting_model_is_refused(one_level_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | {"in_channels": 9})
    pipeline.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out")}
    with pytest.raises(RefusedInputError, match=r"takes 9 channels and returns 4 .*leave sampler out of components"):
        export_folder(ExportOptions(**options))
    with pytest.raises(RefusedInputError, match="image_guidance needs a model that sees an image and a prompt"):
        export_folder(ExportOptions(model=str(one_level_folder), output=str(tmp_path / "out"), image_guidance=True))
    with pytest.raises(RefusedInputError, match="image_guidance needs guidance by text, too: leave no_guidance out"):
        ExportOptions(image_guidance=True, guidance=False).check()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_component_of_a_model_that_sees_an_image_is_exported(pix2pix_folder, marigold_folder, tmp_path):
    # The static depth model has a text of two tokens, and the other one all kinds of guidance.
    for name, model, options in (
        ("pix2pix", pix2pix_folder, {"image_guidance": True, "unroll": 2}),
        ("depth", marigold_folder, {"static": "1x16x32", "with_vae": True}),
    ):
        folder = tmp_path / name
        report = export_folder(ExportOptions(model=str(model), output=str(folder), steps="2", **options))
        assert max(row["rms"] / row["amplification"] for row in report["parity"]) <= 1e-5
        assert all(found["ready"] for found in report["tensorrt"].values())
        again = export_folder(ExportOptions(model=str(model), output=str(folder), verify_only=True))
        assert [row["rms"] for row in again["parity"]] == [row["rms"] for row in report["parity"]]
    names = {value.name for value in onnxruntime.InferenceSession(tmp_path / "pix2pix/unet/sampler.onnx").get_inputs()}
    assert names >= {"image_latents", "guidance_scale", "image_guidance_scale", "negative_encoder_hidden_states"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    stock = MarigoldDepthPipeline.from_pretrained(marigold_folder)
    want = stock(image, generator=torch.Generator().manual_seed(3)).prediction[0, ..., 0]
    assert np.abs(OnnxDepthPipeline(tmp_path / "depth")(image, seed=3) - want).max() <= 1e-4
    images = [
        np.asarray(OnnxPipeline(tmp_path / "pix2pix", form)(["ab"], steps=2, image=image, height=16, width=32)[0], int)
        for form in ("loop", "unrolled")
    ]
    assert np.abs(images[0] - images[1]).max() <= 1
    image.save(tmp_path / "seen.png")
    words = f"--onnx {tmp_path / 'pix2pix'} --image {tmp_path / 'seen.png'} --output_dir {tmp_path / 'generated'}"
    sizes = "--num_inference_steps 2 --height 16 --width 32"
    assert main(["sample", "--prompts", "ab", *words.split(), *sizes.split()]) == 0
    with Image.open(tmp_path / "generated/000.png") as generated:
        assert np.array_equal(np.asarray(generated), images[0])
    assert main(["sample", "--prompts", "ab", *words.split(), *sizes.split(), "--image_guidance_scale", "3"]) == 0
    with Image.open(tmp_path / "generated/001.png") as generated:
        assert not np.array_equal(np.asarray(generated), images[0])


@pytest.mark.slow
def test_marigold_folder_returns_the_depth_of_diffusers(marigold, tmp_path):
    options = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out")}
    folder = tmp_path / "out"
    report = export_folder(ExportOptions(**options, components="text_encoder,unet,vae_encoder,vae_decoder"))
    assert max(row["rms"] for row in report["parity"]) <= 5e-6
    assert {row["sizes"]["sample"][1] for row in report["parity"] if row["graph"].startswith("unet")} == {8}
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["prediction_type"]) == ("MarigoldDepthPipeline", "depth")
    # The graphs and the scheduler of the folder must give what the pipeline of diffusers gives.
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    noise = np.random.default_rng(1).standard_normal((1, 4, 8, 16), np.float32)
    marigold.scheduler = DDIMScheduler.from_config(marigold.scheduler.config, timestep_spacing="trailing")
    marigold.set_progress_bar_config(disable=True)
    given = {"latents": torch.from_numpy(noise), "processing_resolution": 0, "num_inference_steps": 2}
    want = marigold(Image.fromarray(pixels), **given, ensemble_size=1, match_input_resolution=False).prediction
    image = pixels.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    ids = np.asarray(marigold.tokenizer([""], padding="do_not_pad").input_ids, np.int64)
    context = _session(folder, "text_encoder").run(["last_hidden_state"], {"input_ids": ids})[0]
    scale = marigold.vae.config.scaling_factor
    image_latents = np.split(_session(folder, "vae_encoder").run(None, {"sample": image})[0], 2, 1)[0] * scale
    unet, state = _session(folder, "unet"), noise
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        feed = {"sample": np.concatenate([image_latents, state], 1), "encoder_hidden_states": context}
        (output,) = unet.run(None, feed | {"timestep": t.float().numpy()})
        state = scheduler.step(torch.from_numpy(output), t, torch.from_numpy(state)).prev_sample.numpy()
    (decoded,) = _session(folder, "vae_decoder").run(None, {"latent_sample": state / np.float32(scale)})
    got = decoded.mean(1)[0].clip(-1, 1) / 2 + 0.5
    assert np.abs(got - want[0, :, :, 0]).max() <= 1e-4
    assert want.std() > 0.01


@pytest.fixture(scope="module")
def trained(one_level_folder, tmp_path_factory):
    """Return a trainer after three steps, and the folder in which it saved lora/ and pipeline/."""
    folder = tmp_path_factory.mktemp("trained")
    config = TrainingConfig(output_dir=str(folder / "run"), resolution=16, rank=2, learning_rate=0.05)
    trainer = AlignedTrainer.from_pretrained(one_level_folder, config)
    for _ in range(3):
        trainer.step({"latents": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 8, 16)})
    trainer.save_lora(folder / "lora")
    trainer.save_pipeline(folder / "pipeline")
    return trainer, folder


def test_exported_weights_are_those_that_the_trainer_saved(trained, one_level_folder):
    trainer, folder = trained
    merged = ExportJob(ExportOptions(model=str(one_level_folder), lora=(str(folder / "lora"),)))
    saved = ExportJob(ExportOptions(model=str(folder / "pipeline")))
    assert merged.adapters[0]["relative_change"] > 0.01
    weights = saved.model.unet.state_dict()
    for name, value in merged.model.unet.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)
    # The same schedule gives the same steps.
    assert merged.tables == saved.tables
    given = torch.randn(1, 4, 8, 8), torch.tensor(673.16), torch.randn(1, 8, 16)
    with torch.no_grad(), trainer.averaged():
        want = trainer.unet(*given).sample
        torch.testing.assert_close(saved.model.unet(*given).sample, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_model_that_predicts_the_flow_is_sampled_by_euler_steps_with_its_own_shift(one_level_folder, tmp_path):
    model, folder = shutil.copytree(one_level_folder, tmp_path / "model"), tmp_path / "out"
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    options = {"model": str(model), "output": str(folder), "static": "1x16x16", "steps": "3", "guidance": False}
    report = export_folder(ExportOptions(**options, components="unet,sampler"))
    assert max(row["rms"] for row in report["parity"]) <= 1e-5
    assert (report["prediction_type"], report["shift"]) == ("flow_prediction", 3.0)
    stock = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    assert stock.config.prediction_type == "flow_prediction" and stock.config.flow_shift == 3.0
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 16)
    s = torch.tensor([1, 2 / 3, 1 / 3, 0])
    s = 3 * s / (1 + 2 * s)
    state = noise
    with torch.no_grad():
        for sigma, following in pairwise(s):
            state = state + (following - sigma) * unet(state, 1000 * sigma, text).sample
    table = json.loads((folder / "unet/steps.json").read_text())["3"]
    feed = {name: np.asarray(table[name], np.float32) for name in ("timesteps", "coef_x", "coef_out")}
    session = onnxruntime.InferenceSession(folder / "unet/sampler.onnx")
    (got,) = session.run(None, {"latents": noise.numpy(), "encoder_hidden_states": text.numpy(), **feed})
    np.testing.assert_allclose(got, state.numpy(), rtol=0, atol=1e-5 * state.abs().max().item())


def test_lora_of_naive_flow_matching_is_sampled_as_it_was_trained(one_level_folder, tmp_path):
    for form in ("diffusers", "published"):
        options = {"resolution": 16, "objective": "fm", "fm_form": form, "rank": 2, "sampling_shift": 2.0}
        trainer = AlignedTrainer.from_pretrained(one_level_folder, TrainingConfig(output_dir=str(tmp_path), **options))
        trainer.step({"latents": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 8, 16)})
        trainer.save_lora(tmp_path / form)
    trainer.save_pipeline(tmp_path / "pipeline")
    job = ExportJob(ExportOptions(model=str(one_level_folder), lora=(str(tmp_path / "diffusers"),)))
    assert job.flow.prediction_type == "flow_prediction" and job.shift == 2.0
    assert job.tables[2].times == pytest.approx([0.0, 1 / 3, 1.0])
    stated = ExportJob(ExportOptions(model=str(one_level_folder), lora=(str(tmp_path / "diffusers"),), shift=1.0))
    assert stated.shift == 1.0 and stated.tables[2].times == [0.0, 0.5, 1.0]
    for published in (
        ExportOptions(model=str(one_level_folder), lora=(str(tmp_path / "published"),)),
        ExportOptions(model=str(tmp_path / "pipeline")),
    ):
        with pytest.raises(RefusedInputError, match=r"fed the flow time itself \(fm_form published\), which no stock"):
            ExportJob(published)


def test_damaged_tags_of_a_model_are_refused_with_their_file(one_level_folder, tmp_path):
    model = shutil.copytree(one_level_folder, tmp_path / "model")
    for text, sentence in (
        ("[1]", "d2f.json is not a JSON object"),
        ('{"d2f.shift": "x"}', r"model: d2f\.shift must be a number from 0\.001 to 1000, got x: give --shift"),
    ):
        (model / "d2f.json").write_text(text)
        with pytest.raises(RefusedInputError, match=sentence):
            ExportJob(ExportOptions(model=str(model)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sd2_pipeline_with_v_prediction(precision, one_level_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(one_level_folder)
    config = dict(pipeline.unet.config) | {"use_linear_projection": True, "upcast_attention": True}
    torch.manual_seed(2)
    pipeline.unet = UNet2DConditionModel.from_config(config)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipeline.save_pretrained(tmp_path / "model")
    folder = tmp_path / "out"
    options = {"model": str(tmp_path / "model"), "output": str(folder), "precision": precision, "with_vae": True}
    report = export_folder(ExportOptions(**options, components="unet,text_encoder,vae_decoder,sampler"))
    assert report["prediction_type"] == "v_prediction"
    image = onnx.load(folder / "unet/sampler.onnx", load_external_data=False).graph.output[0]
    assert [d.dim_param for d in image.type.tensor_type.shape.dim][2:] == ["height * 2", "width * 2"]
    assert max(row["rms"] for row in report["parity"]) <= {"fp32": 1e-5, "fp16": 3e-3}[precision]
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 16), np.float32)
    given = {"guidance_scale": 3.0, "height": 16, "width": 32}
    want = pipeline("ab", num_inference_steps=4, latents=torch.from_numpy(noise), **given).images[0]
    (got,) = OnnxPipeline(folder)(["ab"], steps=4, noise=noise, **given)
    largest = np.abs(np.asarray(got, np.int16) - np.asarray(want, np.int16)).max()
    assert largest <= {"fp32": 1, "fp16": 3}[precision]
