"""Prompt to picture with guidance: diffusers eager, diffusers compiled, and the three forms of an export.

The embedded miniature at its own 32 x 32 pixels, and a network of Stable Diffusion 1.5's size (random weights) at
256 x 256. Everything runs in one process on the same threads; the pictures are compared before the clock starts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from d2f_fast import Diff2FlowScheduler, load_miniature
from d2f_fast.export.folder import export_folder
from d2f_fast.export.inference import OnnxPipeline
from d2f_fast.export.options import ExportOptions

PROMPT, GUIDANCE_SCALE, UNROLLED = "an owl on a blue background", 3.0, 4
SIZES = {"miniature": 32, "sd15_size": 256}
PROVIDERS = ("diffusers", "diffusers_compiled", "onnx_folder", "onnx_loop", "onnx_unrolled")


@dataclasses.dataclass
class Model:
    """A pipeline in torch, its export, and the noise that every provider begins with."""

    pipeline: Any
    graphs: Path
    noise: np.ndarray[Any, Any]
    side: int
    eager: dict[int, np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=["miniature", pytest.param("sd15_size", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    name = request.param
    source = name if name == "miniature" else str(request.getfixturevalue("sd15_folder"))
    graphs = tmp_path_factory.mktemp(name) / "graphs"
    components = "unet,text_encoder,vae_decoder,sampler"
    options = {"components": components, "unroll": UNROLLED, "steps": "1,2,4,25"}
    export_folder(ExportOptions(model=source, output=str(graphs), **options))  # type: ignore[arg-type]
    pipeline = load_miniature() if name == "miniature" else StableDiffusionPipeline.from_pretrained(source)
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    side = SIZES[name]
    latent = side // pipeline.vae_scale_factor
    noise = np.random.default_rng(0).standard_normal((1, 4, latent, latent), np.float32)
    made = Model(pipeline, graphs, noise, side, {})
    for steps in (1, 2, 4, 25):
        made.eager[steps] = _with_diffusers(made, steps)()
    yield made


def _with_diffusers(model: Model, steps: int) -> Callable[[], np.ndarray[Any, Any]]:
    def draw() -> np.ndarray[Any, Any]:
        latents = torch.from_numpy(model.noise)
        options = {"height": model.side, "width": model.side, "guidance_scale": GUIDANCE_SCALE}
        return np.asarray(model.pipeline(PROMPT, num_inference_steps=steps, latents=latents, **options).images[0])

    return draw


def _with_onnx(model: Model, steps: int, form: Any) -> Callable[[], np.ndarray[Any, Any]]:
    pipeline = OnnxPipeline(model.graphs, form=form, threads=torch.get_num_threads())

    def draw() -> np.ndarray[Any, Any]:
        options = {"height": model.side, "width": model.side, "guidance_scale": GUIDANCE_SCALE}
        return np.asarray(pipeline([PROMPT], steps=steps, noise=model.noise, **options)[0])

    return draw


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_sampling(benchmark: Any, model: Model, steps: int, provider: str) -> None:
    if provider == "onnx_unrolled" and steps != UNROLLED:
        pytest.skip(f"the graph has {UNROLLED} steps written out")
    started = time.perf_counter()
    if provider.startswith("diffusers"):
        forward = model.pipeline.unet.forward
        if provider == "diffusers_compiled":
            model.pipeline.unet.forward = torch.compile(forward)
        draw = _with_diffusers(model, steps)
    else:
        draw = _with_onnx(model, steps, provider.removeprefix("onnx_"))
    try:
        # The first picture loads or compiles; and it must be the eager one's.
        difference = np.abs(draw().astype(np.int16) - model.eager[steps].astype(np.int16)).max()
        assert difference <= 2, difference
        benchmark.extra_info["first_picture_s"] = time.perf_counter() - started
        benchmark.pedantic(draw, rounds=3 if model.side > 32 else 15, iterations=1, warmup_rounds=1)
    finally:
        if provider.startswith("diffusers"):
            model.pipeline.unet.forward = forward
