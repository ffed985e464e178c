"""One provider of bench_sampling in a process of its own, so that its load time and peak memory are its own.

sampling.py SETTINGS.json: prints what it measured as one JSON line, and saves the pictures it drew.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from d2f_fast.files.memory import peak_resident_bytes

PROMPT, GUIDANCE_SCALE = "an owl on a blue background", 3.0

Draw = Callable[[int], np.ndarray[Any, Any]]


def main() -> None:
    """Load, draw the first picture, check nothing (the benchmark does), then time each number of steps."""
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = json.load(file)
    noise = np.load(settings["noise"])
    make = _diffusers if settings["provider"].startswith("diffusers") else _onnx
    started = time.perf_counter()
    draw = make(settings, noise)
    draw(settings["steps"][0])
    load_s = time.perf_counter() - started
    pictures: dict[str, Any] = {}
    seconds: dict[int, list[float]] = {}
    for steps in settings["steps"]:
        pictures[str(steps)] = draw(steps)
        seconds[steps] = [_seconds_of(draw, steps) for _ in range(settings["rounds"][str(steps)])]
    np.savez(settings["pictures"], **pictures)
    print(json.dumps({"load_s": load_s, "peak_mib": peak_resident_bytes() / 2**20, "seconds": seconds}))


def _seconds_of(draw: Draw, steps: int) -> float:
    started = time.perf_counter()
    draw(steps)
    return time.perf_counter() - started


def _diffusers(settings: dict[str, Any], noise: np.ndarray[Any, Any]) -> Draw:
    import torch
    from diffusers import StableDiffusionPipeline

    from d2f_fast import Diff2FlowScheduler, load_miniature

    source = settings["model"]
    pipeline: Any = load_miniature() if source == "miniature" else StableDiffusionPipeline.from_pretrained(source)
    pipeline.scheduler = Diff2FlowScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if settings["provider"] == "diffusers_compiled":
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()

    def draw(steps: int) -> np.ndarray[Any, Any]:
        size = {"height": settings["side"], "width": settings["side"]}
        latents = torch.from_numpy(noise)
        drawn = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, latents=latents, **size)
        return np.asarray(drawn.images[0])

    return draw


def _onnx(settings: dict[str, Any], noise: np.ndarray[Any, Any]) -> Draw:
    from d2f_fast.export.inference import OnnxPipeline

    pipeline = OnnxPipeline(settings["graphs"], form=settings["provider"].removeprefix("onnx_"))

    def draw(steps: int) -> np.ndarray[Any, Any]:
        size = {"height": settings["side"], "width": settings["side"]}
        drawn = pipeline([PROMPT], steps=steps, guidance_scale=GUIDANCE_SCALE, noise=noise, **size)
        return np.asarray(drawn[0])

    return draw


if __name__ == "__main__":
    main()
