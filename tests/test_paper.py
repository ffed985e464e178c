"""Premises of the paper's method, checked on the embedded miniature."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from d2f_fast import Alignment, Diff2FlowScheduler, sample_flow
from d2f_fast.miniature import load_miniature
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity

PROMPTS = ["an owl on a blue background", "a hammer on a white background"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(1))


def run(pipe: StableDiffusionPipeline, guidance: float, **options: object) -> Tensor:
    images = pipe(PROMPTS, guidance_scale=guidance, latents=noise(), output_type="latent", **options).images
    return images


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_flow_euler_ddim_and_euler_discrete_agree_between_the_same_nodes(pipe, guidance):
    config = pipe.scheduler.config
    alignment = Alignment.from_scheduler(pipe.scheduler)
    pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True)
    ddim = run(pipe, guidance, num_inference_steps=4)
    steps = pipe.scheduler.timesteps.tolist()
    nodes = torch.cat([alignment.flow_time(torch.tensor(steps).float()), torch.ones(1)])

    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    euler = run(pipe, guidance, sigmas=((1 - nodes.double()) / nodes.double()).tolist())
    pipe.scheduler = Diff2FlowScheduler.from_config(config)
    ours = run(pipe, guidance, timesteps=steps)
    pipe.scheduler = DDIMScheduler.from_config(config)

    model = BaseModel(pipe)
    condition = model.encode_prompts(PROMPTS)["encoder_hidden_states"]
    negative = model.encode_prompts([""] * len(PROMPTS))["encoder_hidden_states"]
    velocity = unet_velocity(pipe.unet, alignment, condition, negative, guidance)
    with torch.no_grad():
        # DDIM takes the noise as its diffusion state at the first node, where the flow state is n * noise.
        flow = sample_flow(velocity, alignment.to_flow(noise(), nodes[0]), times=nodes)
    for other in (euler, ours, flow):
        assert relative(other, ddim) <= 1e-5


@pytest.mark.slow
def test_fractional_timesteps_are_as_accurate_as_integers(pipe):
    """The paper's summary, experiment 1: the network interpolates in its timestep."""
    alignment = Alignment.from_scheduler(pipe.scheduler)
    model = BaseModel(pipe)
    condition = model.encode_prompts(PROMPTS)["encoder_hidden_states"]
    velocity = unet_velocity(pipe.unet, alignment, condition)
    for integer in (300, 600):
        offsets = torch.arange(11) / 10
        nodes = alignment.flow_time(integer + 1 - offsets)  # they rise in t, from timestep integer + 1 down to integer
        with torch.no_grad():
            start = sample_flow(velocity, noise(), times=torch.linspace(0, nodes[0].item(), 30), method="heun")
            fine = sample_flow(velocity, start, times=nodes, method="heun", return_intermediates=True)
            rest = torch.linspace(nodes[-1].item(), 1, 30)
            reference = model.decode(sample_flow(velocity, fine[-1], times=rest, method="heun"))
            # One long step from each offset to the end is compared with the fine solution of the same path.
            errors = torch.stack(
                [
                    (model.decode(x_t + (1 - t) * velocity(x_t, t)) - reference).square().mean().sqrt()
                    for x_t, t in zip(fine, nodes, strict=True)
                ]
            )
        assert errors[0] > 1e-3  # a long step has an error, so that there is something to compare
        assert (errors <= torch.maximum(errors[0], errors[-1]) * (1 + 1e-3)).all()
