"""`Diff2FlowScheduler` on an SDXL network that predicts the flow, against diffusers' flow samplers and ComfyUI's."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from d2f_fast.sampling.scheduler import Diff2FlowScheduler

GUIDANCE_SCALE = 5.0
PROMPTS = {"prompt": ["ab", "c"], "negative_prompt": ["d", "d"]}


class AcceptedFlowMatchEuler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow-matching Euler with the two members that the stock pipelines of diffusers 0.42 ask for."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


class UnroundedDPMSolver(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++ that feeds the network 1000 times its own sigma, which diffusers rounds down to a whole number."""

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)
        self.timesteps = self.sigmas[:-1] * 1000


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def latents_of(pipe: Any, noise: Tensor, **options: Any) -> Tensor:
    """Return the latents that a pipeline makes of noise."""
    options |= {"height": 16, "width": 16, "guidance_scale": GUIDANCE_SCALE, "output_type": "latent"}
    made: Tensor = pipe(**PROMPTS, latents=noise.clone(), **options).images
    return made


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.isfinite().all() and (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shift", [1.0, 2.5, 6.0])
def test_latents_equal_those_of_flow_matching_euler(flow_xl: Any, noise: Tensor, shift: float) -> None:
    flow_xl.scheduler = AcceptedFlowMatchEuler(shift=shift)
    expected = latents_of(flow_xl, noise, sigmas=[1 - k / 5 for k in range(5)])  # it shifts the sigmas itself
    flow_xl.scheduler = Diff2FlowScheduler.from_config(flow_xl.scheduler.config)
    assert flow_xl.scheduler.config.shift == shift
    assert_close(latents_of(flow_xl, noise, num_inference_steps=5), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_latents_equal_those_of_first_order_dpm_solver_at_its_nodes(flow_xl: Any, noise: Tensor, shift: float) -> None:
    stock = UnroundedDPMSolver(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1
    )
    flow_xl.scheduler = stock
    expected = latents_of(flow_xl, noise, num_inference_steps=5)
    flow_xl.scheduler = Diff2FlowScheduler.from_config(stock.config)
    assert flow_xl.scheduler.config.shift == shift
    assert_close(latents_of(flow_xl, noise, sigmas=stock.sigmas.tolist()), expected)


def comfyui_euler(network: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], noise: Tensor, shift: float) -> Tensor:
    """Restate what ComfyUI does with the nodes ModelSamplingSD3 and KSampler: euler, simple, five steps.

    sigma(t) = shift t / (1 + (shift - 1) t) for t = 1/1000 … 1; the network is fed 1000 sigma, and the clean latents
    are x - sigma * output. Guidance is applied to the clean latents.
    """
    t = torch.arange(1, 1001, dtype=torch.float32) / 1000
    table = shift * t / (1 + (shift - 1) * t)
    sigmas = [table[-(1 + int(k * len(table) / 5))] for k in range(5)] + [torch.tensor(0.0)]
    x = sigmas[0] * noise  # plus (1 - sigma) times empty latents, which are zero
    for sigma, following in pairwise(sigmas):
        conditional, unconditional = (x - sigma * output for output in network(x, 1000 * sigma))
        denoised = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_latents_equal_those_of_comfyui_with_its_flow_sampling(flow_xl: Any, noise: Tensor, shift: float) -> None:
    positive, negative, pooled, negative_pooled = flow_xl.encode_prompt(
        PROMPTS["prompt"], negative_prompt=PROMPTS["negative_prompt"], device="cpu"
    )
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)

    @torch.no_grad()
    def network(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        conditions = ((positive, pooled), (negative, negative_pooled))
        outputs = (
            flow_xl.unet(x, timestep, text, added_cond_kwargs={"text_embeds": vector, "time_ids": sizes}).sample
            for text, vector in conditions
        )
        conditional, unconditional = outputs
        return conditional, unconditional

    flow_xl.scheduler = Diff2FlowScheduler.from_config(flow_xl.scheduler.config, shift=shift)
    assert_close(latents_of(flow_xl, noise, num_inference_steps=5), comfyui_euler(network, noise, shift))


def test_network_of_the_published_form_is_fed_flow_time_and_returns_the_velocity() -> None:
    ours = Diff2FlowScheduler(prediction_type="flow_prediction", fm_form="published", shift=2.0)
    ours.set_timesteps(2)
    assert ours.timesteps.tolist() == pytest.approx([0.0, 1 / 3])
    x, output = torch.randn(2, 1, 4, 2, 2)
    assert_close(ours.step(output, 0.0, x).prev_sample, x + output / 3)
    assert_close(ours.step(output, 1 / 3, x).pred_original_sample, x + 2 / 3 * output)
    assert Diff2FlowScheduler.from_config(ours.config).flow.form == "published"
    with pytest.raises(ValueError, match=r"fm_form must be one of \('diffusers', 'published'\), got 'other'"):
        Diff2FlowScheduler(prediction_type="flow_prediction", fm_form="other")  # type: ignore[arg-type]
