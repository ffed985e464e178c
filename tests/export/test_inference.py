"""Tests of images generated from an export folder, without torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from d2f_fast import Alignment, Diff2FlowScheduler, load_miniature, sample_flow
from d2f_fast.commands.main import main
from d2f_fast.errors import RefusedInputError
from d2f_fast.export.inference import OnnxPipeline
from d2f_fast.export.sessions import PROVIDERS
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.integrate import unet_velocity

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["an owl on a blue background", "a clock on a red background"]


@pytest.mark.parametrize("form", ["loop", "folder", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_export_generates_the_images_of_torch(form, request):
    # The slow case exports the whole miniature, the others a UNet of a single level in its place.
    whole = form == "unrolled"
    pipeline = (
        load_miniature()
        if whole
        else StableDiffusionPipeline.from_pretrained(request.getfixturevalue("short_miniature"))
    )
    folder = request.getfixturevalue("unrolled_miniature" if whole else "exported_miniature")[0]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": ["", ""], "output_type": "np"}
    want = pipeline(PROMPTS, latents=torch.from_numpy(noise), **options).images
    images = OnnxPipeline(folder, form=form)(PROMPTS, steps=4, guidance_scale=3.0, noise=noise)
    got = np.stack([np.asarray(image, np.float32) for image in images]) / 255
    assert np.abs(got - want).max() <= 1 / 255
    assert want.std() > 0.1


def test_fractional_timestep_changes_the_output(exported_miniature):
    session = OnnxPipeline(exported_miniature[0]).graphs.session("unet/model.onnx")
    random = np.random.default_rng(0)
    feed = {
        "sample": random.standard_normal((1, 4, 8, 8), np.float32),
        "encoder_hidden_states": random.standard_normal((1, 16, 128), np.float32),
    }
    outputs = {t: session.run(None, feed | {"timestep": np.asarray(t, np.float32)})[0] for t in (673.16, 673, 672)}
    scale = np.linalg.norm(outputs[673])
    differences = [np.linalg.norm(outputs[673.16] - outputs[t]) / scale for t in (673, 672)]
    # Rounding to 673, as float16 would, or to 672, as bfloat16 would, changes far more than the graph's error of 3e-7.
    assert differences[0] > 1e-5 and differences[1] > 1e-4


@pytest.mark.parametrize("imported", ["", "import d2f_fast.flow.alignment"])
def test_no_torch_is_imported(imported, exported, tmp_path):
    # The second case shows that the test works: an import of torch, at any depth, ends the process.
    code = f"""
import sys
for name in ("torch", "transformers", "onnx"):
    assert name not in sys.modules
    sys.modules[name] = None
{imported}
from d2f_fast.export.inference import OnnxPipeline
for form in ("loop", "folder", "unrolled"):
    OnnxPipeline({str(exported[0])!r}, form)(["ab c"], steps=2, height=16, width=32)[0].save(form + ".png")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if imported:
        assert done.returncode == 1 and "import of torch halted" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert {np.asarray(Image.open(path)).shape for path in tmp_path.iterdir()} == {(16, 32, 3)}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["loop", "folder", "unrolled"])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_gpu_generates_the_images_of_the_cpu(provider, form, unrolled_miniature):
    if provider == "tensorrt":
        pytest.importorskip("tensorrt")
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    cpu, gpu = (
        OnnxPipeline(unrolled_miniature[0], form, providers=PROVIDERS[name])(PROMPTS, steps=4, noise=noise)
        for name in ("cpu", provider)
    )
    for one, other in zip(cpu, gpu, strict=True):
        # TF32 keeps three digits in products and convolutions.
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 4


@pytest.mark.parametrize(("strength", "left"), [(0.5, 2), (0.1, 1), (1.0, 4)])
@pytest.mark.parametrize("form", ["loop", "folder"])
def test_image_to_image_continues_from_the_noised_image(form, strength, left, exported, one_level_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(one_level_folder)
    alignment = Alignment.from_scheduler(pipeline.scheduler)
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    noise = np.random.default_rng(2).standard_normal((1, 4, 8, 8), np.float32)
    onnx = OnnxPipeline(exported[0], form=form)
    options = {"strength": strength, "guidance_scale": 3.0}
    (got,) = onnx(["ab"], steps=4, noise=noise, image=Image.fromarray(pixels), **options)
    with torch.no_grad():
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipeline.vae.encode(image).latent_dist.mean * pipeline.vae.config.scaling_factor
        context, negative = pipeline.encode_prompt(["ab"], "cpu", 1, True, negative_prompt=[""])
        times = alignment.times(4)[-left - 1 :]
        start = alignment.interpolate(latents, torch.from_numpy(noise), times[0])
        final = sample_flow(unet_velocity(pipeline.unet, alignment, context, negative, 3.0), start, times=times)
        want = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    got = np.asarray(got, np.float32).transpose(2, 0, 1)[None] / 255
    assert np.abs(got - want.clamp(0, 1).numpy()).max() <= 1 / 255


@pytest.mark.parametrize("form", ["loop", "folder"])
def test_seed_gives_the_images_of_torch(form, exported_miniature, short_miniature):
    options = {"guidance_scale": 3.0, "negative_prompt": ""}
    generator = torch.Generator().manual_seed(7)
    pipeline = StableDiffusionPipeline.from_pretrained(short_miniature)
    want = generate(pipeline, PROMPTS, num_inference_steps=4, generator=generator, **options)
    got = OnnxPipeline(exported_miniature[0], form)(PROMPTS, steps=4, seed=7, **options)
    assert np.abs(np.stack(got).astype(int) - np.stack(want)).max() <= 1


def test_steps_saved_with_the_weights_are_the_default(exported):
    pipeline, unrolled = (OnnxPipeline(exported[0], form) for form in ("loop", "unrolled"))
    assert pipeline.default_steps == (4, "the default")
    assert unrolled.default_steps == (unrolled.report["unroll"], "as exported with --unroll")
    pipeline.report["recommended_steps"] = 2
    assert pipeline.default_steps == (2, "as saved with the model or LoRA")
    saved, given, other = (np.asarray(pipeline(["ab"], steps=steps)[0]) for steps in (None, 2, 4))
    assert np.array_equal(saved, given) and not np.array_equal(saved, other)
    pipeline.report["recommended_steps"] = "two"
    with pytest.raises(
        RefusedInputError, match=r"recommended_steps must be a whole number.*, got two: export again, or give steps"
    ):
        pipeline(["ab"])


def test_guidance_saved_with_the_weights_is_the_default(exported):
    pipeline = OnnxPipeline(exported[0])
    images = [np.asarray(pipeline(["ab"], steps=2, guidance_scale=scale)[0]) for scale in (3.0, 1.0)]
    assert not np.array_equal(*images)
    for saved, image in zip((None, 1.0), images, strict=True):
        pipeline.report["recommended_guidance"] = saved
        assert np.array_equal(np.asarray(pipeline(["ab"], steps=2)[0]), image)


def test_sample_command_generates_with_an_export_folder(exported, tmp_path, capsys):
    command = ["sample", "--prompts", "ab", "cd", "--onnx", str(exported[0]), "--output_dir", str(tmp_path / "a")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [np.asarray(Image.open(file)).shape for file in result["files"]] == [(16, 16, 3)] * 2
    assert result["shift"] == 1.0
    assert main([*command, "--seed", "1", "--output_dir", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/000.png").read_bytes() != (tmp_path / "b/000.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--num_inference_steps", "5"],
            "5 steps: this export has tables for 1, 2, 4, 8: export with --steps for others",
        ),
        (["--height", "17"], "height 17 is not a multiple of 2"),
        (["--shift", "3"], "shift was settled when"),
        (["--lora", "run"], "lora was settled when"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_option_that_the_export_cannot_serve_is_refused(options, sentence, exported, tmp_path, capsys):
    command = ["sample", "--prompts", "ab", "--onnx", str(exported[0]), "--output_dir", str(tmp_path / "a")]
    assert main([*command, *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert sentence in line
    assert not (tmp_path / "a").exists()


def test_default_size_of_a_model_of_wide_images_is_wide(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps(config | {"sample_size": [8, 12]}))
    (image,) = OnnxPipeline(copy)(["ab"])
    assert image.size == (24, 16)


def test_static_export_generates_exactly_its_batch(exported_static):
    noise = np.random.default_rng(0).standard_normal((2, 4, 16, 8), np.float32)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 16, 3), np.uint8))
    loop, folder = (OnnxPipeline(exported_static[0], form) for form in ("loop", "folder"))
    for options in ({"guidance_scale": 3.0}, {"guidance_scale": 1}, {"image": image, "strength": 0.5}):
        images = [np.stack(one(["ab", "cd"], steps=2, noise=noise, **options)).astype(int) for one in (loop, folder)]
        assert images[0].shape == (2, 32, 16, 3) and np.abs(images[0] - images[1]).max() <= 1
        assert (images[0][0] != images[0][1]).any()
    for pipeline in (loop, folder):
        with pytest.raises(RefusedInputError, match=r"generate 2 images at a time \(--static 2x32x16\), got 1 prompts"):
            pipeline("ab", steps=2)


@pytest.mark.parametrize("guidance_scale", [0, 1])
@pytest.mark.parametrize("form", ["loop", "folder"])
def test_guidance_scale_of_0_or_1_leaves_the_negative_prompt_out(form, guidance_scale, exported, monkeypatch):
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    given = {"steps": 2, "noise": noise, "guidance_scale": guidance_scale}
    # The unrolled form evaluates both prompts and must generate the same image.
    unrolled = OnnxPipeline(exported[0], "unrolled")
    want = np.asarray(unrolled(["ab"], **given | {"guidance_scale": 1})[0], np.int16)
    assert np.abs(np.asarray(unrolled(["ab"], **given)[0], np.int16) - want).max() == 0
    pipeline = OnnxPipeline(exported[0], form)
    texts, encode = [], pipeline._encode
    monkeypatch.setattr(pipeline, "_encode", lambda *given: (texts.append(given[2]), encode(*given))[1])
    got = np.asarray(pipeline("ab", **given)[0], np.int16)
    assert texts == [["ab"]] and "unet/sampler.onnx" not in pipeline.graphs.opened
    assert np.abs(got - want).max() <= 1


def test_invalid_arguments_are_refused(exported, exported_half):
    pipeline = OnnxPipeline(exported[0])
    with pytest.raises(RefusedInputError, match="prompts is empty: give at least one"):
        pipeline([])
    with pytest.raises(RefusedInputError, match="guidance_scale must be finite, got nan"):
        pipeline(["ab"], guidance_scale=float("nan"))
    with pytest.raises(RefusedInputError, match=r"guidance_scale must be 1 or 0, .* or above 1, got 0\.5"):
        pipeline(["ab"], guidance_scale=0.5)
    with pytest.raises(RefusedInputError, match="negative_prompt has no effect with guidance_scale 1: leave it out"):
        pipeline(["ab"], guidance_scale=1, negative_prompt="c")
    with pytest.raises(RefusedInputError, match=r"strength 0\.8 needs an image to start from"):
        pipeline(["ab"], strength=0.8)
    with pytest.raises(RefusedInputError, match="seed must be 0 or above, got -1"):
        pipeline(["ab"], seed=-1)
    with pytest.raises(RefusedInputError, match="height 0 is not a multiple of 2"):
        pipeline(["ab"], height=0)
    with pytest.raises(RefusedInputError, match="form must be one of loop, folder, unrolled, got 'lop'"):
        OnnxPipeline(exported[0], form="lop")
    with pytest.raises(RefusedInputError, match="has no unrolled sampler: export with --unroll, or choose loop"):
        OnnxPipeline(exported_half[0], form="unrolled")
    with pytest.raises(RefusedInputError, match=r"noise must be of shape \[1, 4, 8, 8\], got \[1, 4, 4, 4\]"):
        pipeline(["ab"], noise=np.zeros((1, 4, 4, 4), np.float32))
    with pytest.raises(RefusedInputError, match="strength must be above 0 and at most 1, got 0"):
        pipeline(["ab"], image=Image.new("RGB", (16, 16)), strength=0)
    with pytest.raises(RefusedInputError, match=r"sampler_2\.onnx takes 2 steps, got 4: choose the form loop"):
        OnnxPipeline(exported[0], form="unrolled")(["ab"], steps=4)
