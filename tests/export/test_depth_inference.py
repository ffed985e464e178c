"""Depth from an exported Marigold folder, against the stock pipeline of diffusers."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import MarigoldDepthPipeline
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.depth_inference import OnnxDepthPipeline
from d2f_fast.export.inference import OnnxPipeline


@pytest.fixture(scope="module")
def stock(marigold_folder):
    pipeline = MarigoldDepthPipeline.from_pretrained(marigold_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("form", ["loop", "folder"])
def test_depth_is_that_of_the_stock_pipeline(form, exported_depth, stock):
    pipeline, image = OnnxDepthPipeline(exported_depth[0], form), pixels(16, 32)
    noise = np.random.default_rng(1).standard_normal((1, 4, 8, 16), np.float32)
    for steps in (None, 1):  # the model's own number is 2
        want = stock(image, latents=torch.from_numpy(noise), num_inference_steps=steps).prediction[0, ..., 0]
        got = pipeline(image, noise=noise, steps=steps)
        assert got.shape == (16, 32) and got.dtype == np.float32 and want.std() > 0.01
        assert np.abs(got - want).max() <= 1e-4


def test_model_that_starts_from_zeros_takes_one_step_without_noise(exported_depth, stock):
    pipeline, image = OnnxDepthPipeline(exported_depth[0]), pixels(16, 32)
    assert exported_depth[1]["start"] is None
    pipeline.report["start"] = "zeros"
    want = stock(image, latents=torch.zeros(1, 4, 8, 16), num_inference_steps=1).prediction[0, ..., 0]
    assert np.abs(pipeline(image) - want).max() <= 1e-4 and np.array_equal(
        pipeline(image, steps=1, seed=4), pipeline(image)
    )
    with pytest.raises(
        RefusedInputError, match="graphs was trained to jump from zeros in one step, got steps 2: leave steps out"
    ):
        pipeline(image, steps=2)
    with pytest.raises(
        RefusedInputError, match="noise was given, and the model was trained to start from zeros: leave"
    ):
        pipeline(image, noise=np.zeros((1, 4, 8, 16), np.float32))


def test_image_of_another_size_is_resized_and_its_depth_resized_back(exported_depth, stock):
    pipeline, image = OnnxDepthPipeline(exported_depth[0]), pixels(20, 41)
    got = pipeline(image, processing_resolution=32, seed=3)
    assert got.shape == (20, 41) and got.min() >= 0 and got.max() <= 1
    small = pipeline(image.resize((32, 16), Image.Resampling.BILINEAR), seed=3)
    want = Image.fromarray(small).resize((41, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(got, np.asarray(want))


def test_sampler_sees_the_image_and_takes_no_negative_text(exported_depth):
    folder, report = exported_depth
    session = onnxruntime.InferenceSession(folder / "unet/sampler.onnx")
    shapes = {value.name: value.shape for value in session.get_inputs()}
    names = {"latents", "encoder_hidden_states", "image_latents", "timesteps", "coef_x", "coef_out"}
    assert shapes.keys() == names and shapes["latents"][1] == shapes["image_latents"][1] == 4
    assert not report["guidance"] and not report["image_guidance"]
    rows = [row["rms"] / row["amplification"] for row in report["parity"]]
    assert max(rows) <= 1e-5
    assert all(found["ready"] for found in report["tensorrt"].values())
    assert sum("image_latents:1x4x8x8" in line for line in report["trtexec"]) == 1


def test_arguments_that_the_export_cannot_serve_are_refused(exported_depth, exported):
    pipeline, image = OnnxDepthPipeline(exported_depth[0]), pixels(16, 16)
    with pytest.raises(RefusedInputError, match="3 steps: this export has tables for 1, 2: export with --steps"):
        pipeline(image, steps=3)
    with pytest.raises(RefusedInputError, match="seed must be 0 or above, got -1"):
        pipeline(image, seed=-1)
    with pytest.raises(RefusedInputError, match="processing_resolution must be 0 or above, got -8"):
        pipeline(image, processing_resolution=-8)
    with pytest.raises(RefusedInputError, match="predicts depth and takes no prompts: use OnnxDepthPipeline"):
        OnnxPipeline(exported_depth[0])
    with pytest.raises(RefusedInputError, match="is no export of a MarigoldDepthPipeline: use OnnxPipeline"):
        OnnxDepthPipeline(exported[0])
    index = json.loads((exported_depth[0] / "model_index.json").read_text())
    assert (index["_class_name"], index["prediction_type"]) == ("MarigoldDepthPipeline", "depth")
