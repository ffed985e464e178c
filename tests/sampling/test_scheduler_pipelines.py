"""`Diff2FlowScheduler` in the pipelines of its peers: Euler steps equal those of DDIM at the same nodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    MarigoldDepthPipeline,
    MotionAdapter,
    SchedulerMixin,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import Tensor

from d2f_fast.sampling.scheduler import Diff2FlowScheduler


class Client(NamedTuple):
    """A pipeline of diffusers, and the arguments of a call that ends with latents."""

    pipeline: Any
    arguments: dict[str, Any]


Parts = dict[str, Any]


def image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def unet_with(parts: Parts, in_channels: int) -> UNet2DConditionModel:
    torch.manual_seed(2)
    return UNet2DConditionModel.from_config(dict(parts["unet"].config) | {"in_channels": in_channels})


def mask() -> Tensor:
    return (torch.arange(16) < 6).float().expand(1, 1, 16, 16)


def text_to_image(parts: Parts) -> Client:
    return Client(StableDiffusionPipeline(**parts), {})


def image_to_image(parts: Parts, strength: float) -> Client:
    return Client(StableDiffusionImg2ImgPipeline(**parts), {"image": image(1, 3, 16, 16), "strength": strength})


def inpainting(parts: Parts, channels: int, strength: float) -> Client:
    pipeline = StableDiffusionInpaintPipeline(**parts | {"unet": unet_with(parts, channels)})
    size = {"height": 16, "width": 16}
    return Client(pipeline, {"image": image(1, 3, 16, 16), "mask_image": mask(), "strength": strength, **size})


def control_net(parts: Parts) -> Client:
    torch.manual_seed(3)
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():  # The last layers of a new ControlNet are zero.
        for parameter in control.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    pipeline = StableDiffusionControlNetPipeline(**parts, controlnet=control)
    return Client(pipeline, {"image": image(1, 3, 16, 16), "control_guidance_end": 0.8})


def instruct_pix2pix(parts: Parts) -> Client:
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts | {"unet": unet_with(parts, 8)})
    return Client(pipeline, {"image": image(1, 3, 16, 16), "image_guidance_scale": 1.5})


def t2i_adapter(parts: Parts) -> Client:
    torch.manual_seed(3)
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    parts = {name: part for name, part in parts.items() if name != "image_encoder"}
    pipeline = StableDiffusionAdapterPipeline(**parts, adapter=adapter)
    return Client(pipeline, {"image": image(1, 3, 16, 16), "height": 16, "width": 16})


def perturbed_attention(parts: Parts) -> Client:
    return Client(StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid"), {"pag_scale": 1.5})


def animate_diff(parts: Parts) -> Client:
    torch.manual_seed(3)
    options = {"motion_layers_per_block": 1, "motion_norm_num_groups": 4, "motion_num_attention_heads": 2}
    adapter = MotionAdapter(block_out_channels=(8, 16), **options)
    parts = {name: part for name, part in parts.items() if not name.endswith("safety_checker")}
    return Client(AnimateDiffPipeline(**parts, motion_adapter=adapter), {"num_frames": 2})


def marigold(parts: Parts) -> Client:
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipeline = MarigoldDepthPipeline(**kept, unet=unet_with(parts, 8), prediction_type="depth")
    return Client(pipeline, {"image": image(1, 3, 16, 16), "processing_resolution": 16, "output_latent": True})


CLIENTS: dict[str, Callable[[Parts], Client]] = {
    "text to image": text_to_image,
    **{f"image to image at {s}": lambda parts, s=s: image_to_image(parts, s) for s in (0.3, 0.5, 0.8, 1.0)},
    **{
        f"inpainting with {channels} channels at {s}": lambda parts, c=channels, s=s: inpainting(parts, c, s)
        for channels, s in ((4, 0.6), (4, 1.0), (9, 1.0))
    },
    "ControlNet": control_net,
    "InstructPix2Pix": instruct_pix2pix,
    "T2I-Adapter": t2i_adapter,
    "PAG": perturbed_attention,
    "AnimateDiff": animate_diff,
    "Marigold": marigold,
}


def latents_of(client: Client, scheduler: SchedulerMixin) -> Tensor:
    client.pipeline.scheduler = scheduler
    client.pipeline.set_progress_bar_config(disable=True)
    seeded = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5}
    if "output_latent" in client.arguments:
        latents: Tensor = client.pipeline(**client.arguments, **seeded).latent
        return latents
    text = {"prompt": "ab", "negative_prompt": "c", "guidance_scale": 4.0, "output_type": "latent"}
    found = client.pipeline(**text, **client.arguments, **seeded)
    return found.frames if "num_frames" in client.arguments else found.images


@pytest.mark.parametrize("name", CLIENTS)
def test_euler_steps_equal_ddim_at_the_same_nodes(pipe: StableDiffusionPipeline, name: str) -> None:
    # The table of zero terminal SNR begins at t = 0, so that the trailing nodes of both are the same.
    stock = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    client = CLIENTS[name](pipe.components | {"requires_safety_checker": False})
    expected = latents_of(client, stock)
    got = latents_of(client, Diff2FlowScheduler.from_config(stock.config, flow_spacing="trailing"))
    assert expected.abs().max() > 0.1 and got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
