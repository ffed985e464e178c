"""Measure the miniature and its reflow LoRA at few network evaluations, and print one line for each setting.

    python -m benchmarks.few_steps                      # seed 0, 2,000 images for each setting, captions with a colour
    python -m benchmarks.few_steps --seed 1 --no_colour

A setting of the base counts at its network evaluations, of which guidance takes two for each step. The captions are a
random part of those of the images that the base was made from; the other real images are the reference.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.generation import start_noise
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.miniature import REFLOW_LORA, emoji, load_miniature
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.multistep import sample_multistep

BATCH = 100
GUIDANCE = 2.0


class Setting(NamedTuple):
    """A way to sample: sampler, steps and guidance scale; 1 for none."""

    sampler: str
    steps: int
    guidance: float = 1.0

    @property
    def evaluations(self) -> int:
        """Return the number of network evaluations for each image."""
        return self.steps * (2 if self.guidance > 1 else 1)


SAMPLERS = ("euler uniform", "euler trailing", "ddim trailing")
# DPM-Solver++ of two steps is of first order, which is DDIM.
BASE = (
    *(Setting(name, steps) for steps in (1, 2) for name in SAMPLERS),
    *(Setting(name, 1, GUIDANCE) for name in SAMPLERS),
    Setting("dpm++ uniform", 25),
    Setting("dpm++ uniform", 12, GUIDANCE),
)
REFLOW = tuple(Setting("euler uniform", steps) for steps in (1, 2, 4))


@torch.no_grad()
def generate(model: BaseModel, prompts: list[str], noise: Tensor, setting: Setting) -> Tensor:
    """Return one image [3, H, W] in [-1, 1] for each prompt, as one tensor."""
    sampler, spacing = setting.sampler.split()
    alignment = model.alignment
    times = alignment.times(setting.steps, "trailing" if spacing == "trailing" else "uniform")
    if sampler == "ddim":  # It takes its start noise for the noisy input at the last timestep.
        times[0] = alignment.t_min
        noise = alignment.to_flow(noise, times[0])
    images = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        velocity = prompt_velocity(model, alignment, prompts[part], emoji.SIZE, emoji.SIZE, setting.guidance)
        solve = sample_multistep if sampler == "dpm++" else sample_flow
        latents = solve(velocity, noise[part], times=times)
        assert isinstance(latents, Tensor)
        images.append(model.decode(latents).clamp(-1, 1))
    return torch.cat(images)


def main() -> None:
    """Measure every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of captions, noise and intervals (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="images for each setting (%(default)s)")
    parser.add_argument("--no_colour", action="store_true", help="leave the background colour out of the captions")
    parser.add_argument("--lora", type=Path, default=REFLOW_LORA, help="reflow LoRA (%(default)s)")
    parser.add_argument("--networks", nargs="+", choices=("base", "reflow"), default=("reflow", "base"))
    options = parser.parse_args()
    captions = EvaluationSet(range(len(emoji.names())), options.images, load_classifier(), "noto", 4000, options.seed)
    prompts = [emoji.caption(item.name, None if options.no_colour else item.colour) for item in captions.items]
    for network in options.networks:
        pipeline = load_miniature()
        if network == "reflow":
            fuse_adapter(pipeline, options.lora, 1.0)
        model = BaseModel(pipeline)
        noise = start_noise(options.images, model, options.seed)
        for setting in REFLOW if network == "reflow" else BASE:
            started = time.monotonic()
            row = captions.measure(generate(model, prompts, noise, setting))
            above = row["frechet_distance"] - row["frechet_floor"]
            print(
                f"{network}, {setting.evaluations} evaluations, {setting.sampler}, guidance {setting.guidance:g}:"
                f" distance {row['frechet_distance']:.2f} ({row['frechet_low']:.2f} to {row['frechet_high']:.2f}),"
                f" above real images' {row['frechet_floor']:.2f} by {above:.2f}, right name {row['name_top1']:.1%},"
                f" {time.monotonic() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
