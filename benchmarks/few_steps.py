"""Generate images with the miniature and its reflow LoRA at few network evaluations, and keep their features.

    python -m benchmarks.few_steps --output few_steps             # seed 0, 2,000 images for each setting
    python -m benchmarks.few_steps --output few_steps --seed 1 --no_colour --settings "dpm++ uniform 12 guided"
    python -m benchmarks.few_steps --output few_steps --model run/pipeline --networks full     # of a full finetuning
    python -m benchmarks.few_steps_table few_steps                # tables with intervals, over all seeds in the folder

A setting of the base counts at its network evaluations, of which guidance takes two for each step. The captions are a
random part of those of the images that the base was made from; the other real images are the reference. A setting that
is already in the folder is not generated again, and is refused where another model, LoRA or style made it. Of a
rectified-flow checkpoint only the even steps are taken, because the others are those of a noise schedule.
"""

import argparse
import glob
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.kept_rows import options_of_files, same_options
from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.generation import start_noise
from d2f_fast.evaluation.distances import frechet_distance
from d2f_fast.files.hashes import file_sha256
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.miniature import REFLOW_LORA, emoji
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.multistep import sample_multistep

BATCH = 32  # Larger batches of the miniature leave the cache of a CPU core, and take longer for each image.
GUIDANCE = 2.0
REFERENCE_IMAGES = 4000


class Setting(NamedTuple):
    """A way to sample: sampler, steps and guidance scale; 1 for none."""

    sampler: str
    steps: int
    guidance: float = 1.0

    @property
    def evaluations(self) -> int:
        """Return the number of network evaluations for each image."""
        return self.steps * (2 if self.guidance > 1 else 1)

    @property
    def label(self) -> str:
        """Return the name of this setting."""
        return f"{self.sampler} {self.steps}" + (" guided" if self.guidance > 1 else "")


SAMPLERS = ("euler uniform", "euler trailing", "ddim trailing")
# DPM-Solver++ of two steps is of first order, which is DDIM.
BASE = (
    *(Setting(name, steps) for steps in (1, 2) for name in SAMPLERS),
    *(Setting(name, 1, GUIDANCE) for name in SAMPLERS),
    Setting("dpm++ uniform", 25),
    Setting("dpm++ uniform", 12, GUIDANCE),
)
LORA = tuple(Setting("euler uniform", steps) for steps in (1, 2, 4))


@torch.no_grad()
def generate(model: BaseModel, prompts: list[str], noise: Tensor, setting: Setting) -> Tensor:
    """Return one image [3, H, W] in [-1, 1] for each prompt, as one tensor."""
    sampler, spacing = setting.sampler.split()
    flow = model.flow
    times = flow.times(setting.steps, "trailing" if spacing == "trailing" else "uniform")
    if sampler == "ddim":  # It takes its start noise for the noisy input at the last timestep.
        times[0] = model.alignment.t_min
        noise = flow.to_flow(noise, times[0])
    images = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        velocity = prompt_velocity(model, flow, prompts[part], emoji.SIZE, emoji.SIZE, setting.guidance)
        solve = sample_multistep if sampler == "dpm++" else sample_flow
        latents = solve(velocity, noise[part], times=times)
        assert isinstance(latents, Tensor)
        images.append(model.decode(latents).clamp(-1, 1))
    return torch.cat(images)


def main() -> None:
    """Generate the images of every setting, and keep their features."""
    options = _options()
    names = range(len(emoji.names()))
    captions = EvaluationSet(names, options.images, load_classifier(), options.style, REFERENCE_IMAGES, options.seed)
    prompts = [emoji.caption(item.name, None if options.no_colour else item.colour) for item in captions.items]
    right = np.array([item.name for item in captions.items])
    options.output.mkdir(parents=True, exist_ok=True)
    of_images = {"style": options.style}
    suffix = f"{options.images} images, seed {options.seed}"
    space = captions.space
    same_options(options_of_files(options.output.glob("real, *.npz")), of_images)
    np.savez(
        options.output / f"real, {suffix}.npz",
        features=space.features(captions.real),
        reference=space.reference,
        options=json.dumps(of_images),
    )
    for network in options.networks:
        pipeline = load_pipeline(options.model)
        lora = file_sha256(options.lora) if network == "lora" else ""
        if lora:
            fuse_adapter(pipeline, options.lora, 1.0)
        model = BaseModel(pipeline)
        noise = start_noise(options.images, model, options.seed)
        label = {"base": "base", "lora": options.lora.stem, "full": Path(options.model).parent.name}[network]
        own = of_images | {"model": options.model, "lora": lora}
        same_options(options_of_files(options.output.glob(f"{glob.escape(label)}, *.npz")), own)
        for setting in BASE if network == "base" else LORA:
            if model.flow.prediction_type == "flow_prediction" and "uniform" not in setting.sampler:
                continue
            kind = "captions without a colour" if options.no_colour else "captions with a colour"
            path = options.output / f"{label}, {setting.label}, {kind}, {suffix}.npz"
            if path.exists() or (options.settings and setting.label not in options.settings):
                continue
            started = time.process_time()
            images = generate(model, prompts, noise, setting)
            features = space.features(images)
            with torch.no_grad():
                guesses = torch.cat([captions.classifier(part) for part in images.split(256)]).argmax(1).numpy()
            np.savez(
                path,
                network=label,
                setting=setting.label,
                evaluations=setting.evaluations,
                captions=kind,
                seed=options.seed,
                options=json.dumps(own),
                features=features,
                right_names=guesses == right,
            )
            distance = frechet_distance(features, space.reference)
            print(f"{path.stem}: distance {distance:.2f}, {time.process_time() - started:.0f} s of CPU", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the features")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and noise (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="images for each setting (%(default)s)")
    parser.add_argument("--no_colour", action="store_true", help="leave the background colour out of the captions")
    parser.add_argument(
        "--lora", type=Path, default=REFLOW_LORA, help="LoRA; its rows have its file name (%(default)s)"
    )
    text = "model folder, whose `full` rows have the name of the folder that it is in (%(default)s)"
    parser.add_argument("--model", default="miniature", help=text)
    text = "the model as it is by the base's settings, with the LoRA, or as it is in few even steps (lora base)"
    parser.add_argument("--networks", nargs="+", choices=("base", "lora", "full"), default=("lora", "base"), help=text)
    parser.add_argument("--style", choices=emoji.STYLES, default="noto", help="style of the images (%(default)s)")
    labels = list(dict.fromkeys(setting.label for setting in (*LORA, *BASE)))
    parser.add_argument("--settings", nargs="+", choices=labels, help="settings to generate (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
