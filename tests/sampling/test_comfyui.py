"""The graphs for ComfyUI fit its nodes, and its Euler sampler gives the latents of this package with their numbers."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast import Alignment, Diff2FlowScheduler, load_miniature

GRAPHS = Path(__file__).resolve().parents[2] / "docs/comfyui"
# Inputs of each node: the type of a link, or that of a value; and the types of its outputs.
NODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ("MODEL",)),
    "ModelSamplingSD3": ({"model": "MODEL", "shift": float}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": str}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "SamplerCustom": (
        {
            **{"model": "MODEL", "add_noise": bool, "noise_seed": int, "cfg": float, "positive": "CONDITIONING"},
            **{"negative": "CONDITIONING", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        },
        ("LATENT", "LATENT"),
    ),
    "KSampler": (
        {
            **{"model": "MODEL", "seed": int, "steps": int, "cfg": float, "sampler_name": str, "scheduler": str},
            **{"positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": float},
        },
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}


def graph(name: str) -> dict[str, Any]:
    """Return a graph by node number."""
    content: dict[str, Any] = json.loads((GRAPHS / name).read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", sorted(path.name for path in GRAPHS.glob("*.json")))
def test_every_input_of_a_graph_has_the_type_that_its_node_takes(name: str) -> None:
    nodes = graph(name)
    for node in nodes.values():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys()
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                source, output = value
                assert NODES[nodes[source]["class_type"]][1][output] == inputs[key]
            else:
                assert type(value) is inputs[key]
    assert [node["class_type"] for node in nodes.values()].count("SaveImage") == 1


def manual_sigmas(text: str) -> list[float]:
    """Read numbers as the node ManualSigmas does, which knows no exponents."""
    return [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


def test_lists_of_the_page_are_even_steps_in_flow_time() -> None:
    page = GRAPHS.with_suffix(".md").read_text(encoding="utf-8")
    lists = re.findall(r"^\| (\d+) \| `([\d., ]+)` \|$", page, re.MULTILINE)
    assert [int(steps) for steps, _ in lists] == [1, 2, 4, 8]
    alignment = Alignment.from_scheduler(load_miniature().scheduler)
    for steps, text in lists:
        assert manual_sigmas(text) == pytest.approx(alignment.sigmas(int(steps)), rel=4e-4)


@torch.no_grad()
def comfyui_euler(pipe: Any, noise: Tensor, sigmas: list[float], cfg: float, prompt: str) -> Tensor:
    """Restate what ComfyUI does with SamplerCustom, ManualSigmas and euler for a network that predicts ε.

    Noise is scaled by √(1 + σ²) where σ is at least the largest one of the model; the network is fed x / √(1 + σ²) and
    the whole timestep whose log σ is nearest; guidance is applied to the clean latents x - σ ε.
    """
    table = ((1 - pipe.scheduler.alphas_cumprod) / pipe.scheduler.alphas_cumprod).sqrt()
    texts = pipe.encode_prompt(prompt, "cpu", 1, True)
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, following in pairwise(sigmas):
        timestep = (torch.tensor(sigma).log() - table.log()).abs().argmin()
        fed = x / (sigma**2 + 1) ** 0.5
        conditional, unconditional = (x - sigma * pipe.unet(fed, timestep, text).sample for text in texts)
        denoised = unconditional + cfg * (conditional - unconditional)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def test_euler_of_comfyui_gives_the_latents_of_this_package() -> None:
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    nodes = {node["class_type"]: node["inputs"] for node in graph("lora_four_steps.json").values()}
    sigmas, cfg = manual_sigmas(nodes["ManualSigmas"]["sigmas"]), nodes["SamplerCustom"]["cfg"]
    assert sigmas == pytest.approx(Alignment.from_scheduler(pipe.scheduler).sigmas(4), rel=2e-4)
    noise, prompt = torch.randn(1, 4, 8, 8), "an owl on a blue background"
    got = comfyui_euler(pipe, noise, sigmas, cfg, prompt)
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    want = pipe(prompt, latents=noise, num_inference_steps=4, guidance_scale=cfg, output_type="latent").images
    # ComfyUI rounds 673.16 and 95.3 to whole timesteps.
    assert torch.linalg.vector_norm(got - want) <= 3e-3 * torch.linalg.vector_norm(want)
    assert torch.linalg.vector_norm(got - want) > 1e-5 * torch.linalg.vector_norm(want)
