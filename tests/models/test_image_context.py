"""Images that a network sees beside its latents, against diffusers' pipeline of InstructPix2Pix."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.conv_in import widen_conv_in
from d2f_fast.models.image_context import encode_context
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.models.solve import Sampling, generate_images, invert_images
from d2f_fast.sampling.integrate import sample_flow

PROMPTS = ["ab", "c"]


@pytest.fixture(scope="module")
def pix2pix(pipeline: Any) -> Any:
    """Return a tiny pipeline of InstructPix2Pix with weights of its own for the image, sampled by DDIM from t = 0."""
    network = type(pipeline.unet).from_config(pipeline.unet.config).eval().requires_grad_(False)
    network.load_state_dict(pipeline.unet.state_dict())
    widen_conv_in(network)
    torch.manual_seed(5)
    network.conv_in.weight.add_(0.1 * torch.randn_like(network.conv_in.weight))
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    parts = pipeline.components | {"unet": network, "scheduler": scheduler}
    made = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.mark.parametrize(("text_scale", "image_scale"), [(4.0, 1.0), (4.0, 1.5), (1.0, 1.0)])
@torch.no_grad()
def test_guidance_is_that_of_the_pipeline_of_diffusers(
    pix2pix: Any, images: list[Image.Image], text_scale: float, image_scale: float
) -> None:
    noise = torch.randn(2, 4, 8, 8)
    scales = {"guidance_scale": text_scale, "image_guidance_scale": image_scale}
    given = {"latents": noise, "num_inference_steps": 5, "output_type": "latent", **scales}
    expected = pix2pix(PROMPTS, images, negative_prompt=["d", "d"], **given).images
    model = BaseModel(pix2pix)
    alignment = Alignment.from_scheduler(pix2pix.scheduler)
    context = encode_context(model, images, 16, 16)
    negative = model.encode_prompts(["d"])
    velocity = prompt_velocity(
        *(model, alignment, PROMPTS, 16, 16, text_scale, negative),
        context=context,
        image_guidance_scale=image_scale,
    )
    got = sample_flow(velocity, noise, times=alignment.times(5, "trailing"))
    assert isinstance(got, torch.Tensor)
    assert (got - expected).abs().max() <= 3e-6 * expected.abs().max()
    sampling = Sampling(num_inference_steps=5, negative_prompt="d" * (text_scale > 1), height=16, width=16)
    sampling = replace(sampling, flow_spacing="trailing", **scales)
    generated = generate_images(model, PROMPTS, sampling, noise=noise, context=context)
    differences = [
        np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()
        for a, b in zip(generated, to_pil(model.decode(expected)), strict=True)
    ]
    assert max(differences) <= 1


def test_context_is_scaled_and_first_for_networks_that_are_trained_here(
    model: BaseModel, pix2pix: Any, images: list[Image.Image]
) -> None:
    unscaled, scaled = (encode_context(each, images, 16, 16) for each in (BaseModel(pix2pix), model))
    assert model.vae.config.scaling_factor == 0.5
    assert (0.5 * unscaled - scaled).abs().max() <= 1e-6 * scaled.abs().max()
    cropped = encode_context(model, [Image.new("RGB", (40, 20), "red")], 8, 16)
    assert cropped.shape == (1, 4, 4, 8)


def test_context_that_the_network_does_not_take_is_refused(
    model: BaseModel, pix2pix: Any, images: list[Image.Image]
) -> None:
    sees, sampling = BaseModel(pix2pix), Sampling(height=16, width=16)
    with pytest.raises(
        RefusedInputError, match="sees an image beside its own latents, in 4 channels, and prompts give"
    ):
        generate_images(sees, PROMPTS, sampling)
    with pytest.raises(RefusedInputError, match="sees an image beside its own latents"):
        invert_images(sees, images, PROMPTS, replace(sampling, method="rk4"))
    with pytest.raises(RefusedInputError, match=r"context must have shape \[2, 4, 8, 8\] .*, got \[1, 4, 8, 8\]"):
        generate_images(sees, PROMPTS, sampling, context=torch.zeros(1, 4, 8, 8))
    with pytest.raises(RefusedInputError, match=r"context must have shape \[2, 0, 8, 8\] .*, got \[2, 4, 8, 8\]"):
        generate_images(model, PROMPTS, sampling, context=torch.zeros(2, 4, 8, 8))
    with pytest.raises(RefusedInputError, match="image_guidance_scale must be 1"):
        generate_images(sees, PROMPTS, replace(sampling, image_guidance_scale=0.5), context=torch.zeros(2, 4, 8, 8))
