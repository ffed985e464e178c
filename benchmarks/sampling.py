"""Run one provider of bench_sampling in a process of its own, so that its load time and peak memory are its own.

`sampling.py SETTINGS.json` prints what it measured as one line of JSON, and saves the images that it generated.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from d2f_fast.files.memory import peak_resident_bytes

PROMPT, GUIDANCE_SCALE = "an owl on a blue background", 3.0

Generate = Callable[[int], npt.NDArray[np.uint8]]  # from a number of steps to the pixels of an image


def main() -> None:
    """Load, generate a first image, then time each number of steps; the benchmark compares the images."""
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = json.load(file)
    noise = np.load(settings["noise"])
    make = _diffusers if settings["provider"].startswith("diffusers") else _onnx
    started = time.perf_counter()
    generate = make(settings, noise)
    generate(settings["steps"][0])
    load_s = time.perf_counter() - started
    images: dict[str, npt.NDArray[np.uint8]] = {}
    seconds: dict[int, list[float]] = {}
    for steps in settings["steps"]:
        images[str(steps)] = generate(steps)
        seconds[steps] = [_seconds_of(generate, steps) for _ in range(settings["rounds"][str(steps)])]
    np.savez(settings["images"], **images)
    print(json.dumps({"load_s": load_s, "peak_mib": peak_resident_bytes() / 2**20, "seconds": seconds}))


def _seconds_of(generate: Generate, steps: int) -> float:
    started = time.perf_counter()
    generate(steps)
    return time.perf_counter() - started


def _diffusers(settings: dict[str, Any], noise: npt.NDArray[np.float32]) -> Generate:
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

    def generate(steps: int) -> npt.NDArray[np.uint8]:
        size = {"height": settings["side"], "width": settings["side"]}
        latents = torch.from_numpy(noise)
        output = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, latents=latents, **size)
        return np.asarray(output.images[0])

    return generate


def _onnx(settings: dict[str, Any], noise: npt.NDArray[np.float32]) -> Generate:
    from d2f_fast.export.inference import OnnxPipeline

    pipeline = OnnxPipeline(settings["graphs"], form=settings["provider"].removeprefix("onnx_"))

    def generate(steps: int) -> npt.NDArray[np.uint8]:
        size = {"height": settings["side"], "width": settings["side"]}
        images = pipeline([PROMPT], steps=steps, guidance_scale=GUIDANCE_SCALE, noise=noise, **size)
        return np.asarray(images[0])

    return generate


if __name__ == "__main__":
    main()
