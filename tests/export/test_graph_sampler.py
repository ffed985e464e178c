"""Images that a network edits by a prompt, from an export of InstructPix2Pix, against torch."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.inference import OnnxPipeline
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.image_context import encode_context
from d2f_fast.models.solve import Sampling, generate_images


@pytest.fixture(scope="module")
def model(pix2pix_folder):
    return BaseModel.load(pix2pix_folder)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


@pytest.mark.parametrize("form", ["loop", "folder"])
def test_edited_images_are_those_of_torch(form, exported_pix2pix, model, image):
    pipeline, prompts = OnnxPipeline(exported_pix2pix, form), ["ab", "c"]
    noise = np.random.default_rng(1).standard_normal((2, 4, 8, 8), np.float32)
    context = encode_context(model, [image, image], 16, 16)
    sampling, shown = Sampling(num_inference_steps=2, height=16, width=16), []
    for scales in ((3.0, 1.0), (3.0, 2.0), (1.0, 1.0), (1.0, 2.0), (0.0, 1.0)):
        given = dict(zip(("guidance_scale", "image_guidance_scale"), scales, strict=True))
        want = generate_images(
            model, prompts, replace(sampling, **given), noise=torch.from_numpy(noise), context=context
        )
        got = pipeline(prompts, steps=2, noise=noise, image=image, **given)
        shown.append(np.stack(got).astype(int))
        assert np.abs(shown[-1] - np.stack(want)).max() <= 1, scales
        if scales == (3.0, 2.0):
            several = pipeline(prompts, steps=2, noise=noise, image=[image, image], **given)
            assert np.array_equal(np.stack(several), np.stack(got))
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(shown)) > 1
    # The Loop always takes both kinds of guidance: it serves no scale of 1.
    assert ("unet/sampler.onnx" in pipeline.graphs.opened) == (form == "loop")


def test_arguments_that_the_graphs_cannot_serve_are_refused(exported_pix2pix, exported, image):
    pipeline = OnnxPipeline(exported_pix2pix)
    with pytest.raises(RefusedInputError, match="sees an image, and none was given: give image"):
        pipeline(["ab"], steps=2)
    with pytest.raises(RefusedInputError, match=r"sees an image, and strength 0\.5 has no use: leave it out"):
        pipeline(["ab"], steps=2, image=image, strength=0.5)
    with pytest.raises(RefusedInputError, match="image_guidance_scale must be 1, which turns it off, or above, got 0"):
        pipeline(["ab"], steps=2, image=image, image_guidance_scale=0)
    with pytest.raises(RefusedInputError, match="sees no image: leave image_guidance_scale out"):
        OnnxPipeline(exported[0])(["ab"], steps=2, image_guidance_scale=2)
    with pytest.raises(RefusedInputError, match=r"give one image, or one for each of the 1 prompts .*, got 2"):
        pipeline(["ab"], steps=2, image=[image, image])
    pipeline._sampler.built = 2  # as after an export without --image_guidance
    with pytest.raises(RefusedInputError, match=r"without guidance by image: .* got 2; export with --image_guidance"):
        pipeline(["ab"], steps=2, image=image, image_guidance_scale=2)
