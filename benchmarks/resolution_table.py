"""Adapt the miniature to sizes that it never saw, by several objectives, and compare them at several numbers of steps.

    npm install emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    for size in 48 64; do for split in train test; do python -m d2f_fast.miniature.build images \\
        --npm node_modules --size $size --split $split --output emoji/$size/$split; done; done
    python -m benchmarks.resolution_table --pictures emoji --output resolution_table --estimate
    python -m benchmarks.resolution_table --pictures emoji --output resolution_table --seeds 0
    python -m benchmarks.resolution_table --output resolution_table --table

A case is one network: the base as it is, or one run of `d2f train`. It generates one image for each of some captions of
combinations that neither the base nor the runs were trained on, without guidance. The base and the diffusion run are
sampled by DDIM with trailing timesteps, which is the base's own sampler, and the others by Euler steps along the flow.
A seed decides the training, the captions and the noise. A case that is already in the folder is not run again, and is
refused where other options made it.

Distances are Fréchet distances to other real images of the same size, less that of real images to them, in two sets of
features: those of EfficientNet-Lite0 at 128 x 128 pixels, to which images are enlarged, so that their details count;
and those of the miniature's classifier, for which they are reduced to its 32 x 32 pixels. The intervals of 95 % are
from resampling images, alike for all cases, so that differences of two cases have intervals of their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.kept_rows import options_of_files, same_options
from d2f_fast.commands.load_model import load_with_lora
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.images import preprocess, to_rgb
from d2f_fast.evaluation.distances import Array, bootstrap_deviations, frechet_distance, real_floor
from d2f_fast.evaluation.feature_space import FeatureSpace
from d2f_fast.evaluation.features import ImageNetFeatures, is_installed
from d2f_fast.flow.flow import Flow
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import sample_flow

BATCH = 32  # Larger batches of the miniature leave the cache of a CPU core, and take longer for each image.
STEPS = (1, 2, 4, 10)
OWN_STEPS = 25  # of the base's own sampler, beside these
OBJECTIVES: dict[str, dict[str, str]] = {
    "diffusion": {"objective": "diffusion"},
    "fm_published": {"objective": "fm", "fm_form": "published"},
    "fm_diffusers": {"objective": "fm", "fm_form": "diffusers"},
    "diff2flow": {"objective": "diff2flow"},
}
ADAPTERS = {
    "lora": {"adapter": "lora", "rank": "64", "conv_rank": "64", "first_last_layers": "", "lora_format": "diffusers"},
    "full": {"adapter": "full"},
}
CASES = {
    "base": {},
    **{f"{adapter}_{name}": {**ADAPTERS[adapter], **OBJECTIVES[name]} for adapter in ADAPTERS for name in OBJECTIVES},
}
LEARNING_RATES = {"lora": 1e-3, "full": 3e-4}
DEFAULT_CASES = tuple(case for case in CASES if not case.startswith("full"))
TRAINING = {
    "pretrained_model_name_or_path": "miniature",
    "random_flip": "",
    "lr_scheduler": "cosine",
    "ema_decay": "0.99",
    "checkpointing_steps": "0",
}


class Captions(NamedTuple):
    """Captions, and the spaces of features in which images of them are compared with real ones.

    Attributes:
        prompts: The captions.
        spaces: Space of features by the name of its network.
        real: Features of the real images of the captions, likewise.
    """

    prompts: list[str]
    spaces: dict[str, FeatureSpace]
    real: dict[str, Array]


def images_of(folder: CaptionedImages, indices: Sequence[int], size: int) -> Tensor:
    """Return images of a folder, [N, 3, size, size] in [-1, 1]."""
    return torch.stack([preprocess(to_rgb(folder[i]["image"]), size, center_crop=True, flip=False) for i in indices])


def reduced(images: Tensor) -> Tensor:
    """Return images of any size at the 32 x 32 pixels of the classifier."""
    small = torch.nn.functional.interpolate(images, (emoji.SIZE, emoji.SIZE), mode="bicubic", antialias=True)
    return small.clamp(-1, 1)


def captions_of(pictures: Path, size: int, count: int, others_count: int, seed: int) -> Captions:
    """Choose captions of held-out combinations, and compute the features of real images."""
    train, test = (CaptionedImages(pictures / str(size) / split) for split in ("train", "test"))
    random = np.random.default_rng(seed)
    order, others = random.permutation(len(test)).tolist(), random.permutation(len(train)).tolist()
    own, rest = order[:count], order[count:]
    real = images_of(test, own, size)
    # The reference has both kinds of combinations, as many as there are of each among all.
    share = min(len(rest), round(others_count * len(test) / (len(test) + len(train))))
    reference = torch.cat([images_of(test, rest[:share], size), images_of(train, others[: others_count - share], size)])
    classifier = load_classifier()
    spaces = {"classifier": FeatureSpace(lambda x: classifier.features(reduced(x)), real, reference, seed)}
    if is_installed():
        spaces["imagenet"] = FeatureSpace(ImageNetFeatures(), real, reference, seed)
    features = {name: space.features(real) for name, space in spaces.items()}
    return Captions([test.captions(i).text for i in own], spaces, features)


@torch.no_grad()
def generate(
    model: BaseModel, flow: Flow | None, prompts: Sequence[str], noise: Tensor, steps: int, size: int
) -> Tensor:
    """Return one image for each prompt, [N, 3, size, size] in [-1, 1].

    Args:
        model: Model that generates.
        flow: Flow of its network, for Euler steps; None for DDIM with trailing timesteps.
        prompts: N prompts.
        noise: Start noise, [N, C, h, w].
        steps: Number of steps.
        size: Side of the images in pixels.
    """
    if flow is None:
        flow = model.alignment
        times = flow.times(steps, "trailing")
        times[0] = model.alignment.t_min  # DDIM takes its start noise for the noisy input at the last timestep.
        noise = flow.to_flow(noise, times[0])
    else:
        times = flow.times(steps)
    images = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        velocity = prompt_velocity(model, flow, prompts[part], size, size, 1.0)
        latents = sample_flow(velocity, noise[part], times=times)
        assert isinstance(latents, Tensor)
        images.append(model.decode(latents).clamp(-1, 1))
    return torch.cat(images)


def arguments(case: str, size: int, seed: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of the training of a case, without the name of the program."""
    chosen = {
        **TRAINING,
        **CASES[case],
        "train_data_dir": str(options.pictures / str(size) / "train"),
        "resolution": str(size),
        "train_batch_size": str(options.batch),
        "max_train_steps": str(options.steps),
        "learning_rate": str(learning_rate(case, options)),
        "lr_warmup_steps": str(options.warmup),
        "seed": str(seed),
        "cache_dir": str(options.output / "cache"),
        "output_dir": str(folder),
    }
    return ["train", *(word for name, value in chosen.items() for word in (f"--{name}", value) if word)]


def learning_rate(case: str, options: argparse.Namespace) -> float:
    """Return the highest learning rate of a case: the one that was given, or else that of its adapter."""
    rate: float = options.learning_rate or LEARNING_RATES[case.partition("_")[0]]
    return rate


def options_of_images(options: argparse.Namespace) -> dict[str, object]:
    """Return the options that decide the captions and the real images."""
    images, reference = options.images, options.reference_images
    return {"pictures": str(options.pictures.resolve()), "images": images, "reference_images": reference}


def options_of_row(case: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the options that decide the rows of a case."""
    chosen = options_of_images(options) | {"sampling_steps": sorted(set(options.sampling_steps))}
    if case != "base":
        chosen |= {name: getattr(options, name) for name in ("steps", "batch", "warmup")}
        chosen["learning_rate"] = learning_rate(case, options)
    return chosen


def load(case: str, folder: Path | None) -> tuple[BaseModel, Flow | None]:
    """Return the network of a case, and its flow; None where it is sampled by DDIM."""
    if folder is None:
        return BaseModel(load_miniature()), None
    if case.startswith("full"):
        loaded = load_with_lora(str(folder / "pipeline"), (), ModelOptions(), None)
    else:
        loaded = load_with_lora("miniature", (str(folder),), ModelOptions(), None)
    flow = None if case.endswith("diffusion") else loaded.flow_scheduler().flow
    return BaseModel(loaded.pipeline, ModelOptions(), loaded.facts), flow


def run(case: str, size: int, seed: int, options: argparse.Namespace, captions: Captions) -> None:
    """Train one case, generate its images, and write their features."""
    started, folder = time.monotonic(), None
    with tempfile.TemporaryDirectory() as temporary:
        if case != "base":
            folder = Path(temporary) / "run"
            words = arguments(case, size, seed, options, folder)
            subprocess.run([sys.executable, "-m", "d2f_fast", *words], check=True)
        model, flow = load(case, folder)
    trained = time.monotonic()
    shape = (len(captions.prompts), *model.latents_shape(size, size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    features: dict[str, Array] = {}
    for steps in sorted({*options.sampling_steps, *([OWN_STEPS] if case == "base" else [])}):
        images = generate(model, flow, captions.prompts, noise, steps, size)
        for name, space in captions.spaces.items():
            features[f"{name} {steps}"] = space.features(images).astype(np.float32)
    path = options.output / f"{size} {case} {seed}.npz"
    np.savez(path, **features, options=json.dumps(options_of_row(case, options)))  # type: ignore[arg-type]
    done = time.monotonic()
    print(f"{path.stem}: {trained - started:.0f} s of training, {done - trained:.0f} s of sampling", flush=True)


class Row(NamedTuple):
    """Distance of one case at one number of steps.

    Attributes:
        above: Distance above the floor, the mean over the seeds.
        deviations: Deviations of it in the bootstrap.
        seeds: Seeds that it is the mean of.
    """

    above: float
    deviations: Array
    seeds: tuple[int, ...]

    def minus(self, other: "Row") -> "Row":
        """Return the difference of two rows, whose images were resampled alike."""
        return Row(self.above - other.above, self.deviations - other.deviations, self.seeds)

    def __str__(self) -> str:
        """Return the distance with its 95 % interval."""
        low, high = np.quantile(self.above + self.deviations, (0.025, 0.975))
        return f"{self.above:.2f} ({low:.2f} to {high:.2f})"


def rows_of(output: Path, network: str, size: int, repeats: int) -> dict[tuple[str, int], Row]:
    """Return the rows of one size in the features of one network, by case and number of steps."""
    measured: dict[tuple[str, int], list[tuple[int, float, Array]]] = {}
    for path in sorted(output.glob(f"{size} * *.npz")):
        _, case, seed = path.stem.split(" ")
        if case == "real":
            continue
        with np.load(path) as found, np.load(output / f"{size} real {seed}.npz") as real:
            reference, floor = real[f"{network} reference"], float(real[f"{network} floor"])
            for key in (key for key in found.files if key.startswith(f"{network} ")):
                features = found[key].astype(np.float64)
                deviations = bootstrap_deviations(
                    frechet_distance, features, reference, repeats=repeats, seed=int(seed)
                )
                above = frechet_distance(features, reference) - floor
                measured.setdefault((case, int(key.split()[1])), []).append((int(seed), above, deviations))
    return {
        key: Row(
            float(np.mean([above for _, above, _ in runs])),
            np.mean([deviations for *_, deviations in runs], axis=0),
            tuple(seed for seed, *_ in runs),
        )
        for key, runs in measured.items()
    }


def table(output: Path, repeats: int) -> Iterator[str]:
    """Yield the lines of the tables of all sizes in a folder."""
    sizes = sorted({int(path.stem.split(" ")[0]) for path in output.glob("*.npz")})
    for size in sizes:
        for network in ("imagenet", "classifier"):
            rows = rows_of(output, network, size, repeats)
            steps = sorted({count for _, count in rows})
            if not rows:
                continue
            yield f"\n{size} px, features of {network}: distance above that of real images, lower is better\n"
            yield "| case | seeds | " + " | ".join(f"{count} step{'s' * (count > 1)}" for count in steps) + " |"
            yield "|---|---|" + "---|" * len(steps)
            for case in (case for case in CASES if any(case == found for found, _ in rows)):
                seeds = next(row.seeds for (found, _), row in rows.items() if found == case)
                cells = (str(rows.get((case, count), "")) for count in steps)
                yield f"| {case} | {', '.join(map(str, seeds))} | {' | '.join(cells)} |"
            yield from differences(rows, steps)


def differences(rows: dict[tuple[str, int], Row], steps: Sequence[int]) -> Iterator[str]:
    """Yield how far the distances of diff2flow are from those of the others with as many seeds, negative if smaller."""
    yield ""
    for adapter in ADAPTERS:
        for other in ("base", *(f"{adapter}_{name}" for name in OBJECTIVES if name != "diff2flow")):
            own = f"{adapter}_diff2flow"
            both = [count for count in steps if (own, count) in rows and (other, count) in rows]
            both = [count for count in both if rows[own, count].seeds == rows[other, count].seeds]
            if both:
                cells = (f"{count}: {rows[own, count].minus(rows[other, count])}" for count in both)
                yield f"- {own} minus {other}, by steps: {'; '.join(cells)}"


def estimate(options: argparse.Namespace) -> float:
    """Print how long the cases will take on this machine, and return it in minutes."""
    total = 0.0
    model = BaseModel(load_miniature())
    for size in options.sizes:
        noise = torch.randn(BATCH, *model.latents_shape(size, size))
        prompts = [emoji.caption(0, 0)] * BATCH
        seconds = {}
        for steps in (1, 3):
            generate(model, None, prompts, noise, steps, size)
            started = time.process_time()
            generate(model, None, prompts, noise, steps, size)
            seconds[steps] = (time.process_time() - started) / BATCH
        evaluation = (seconds[3] - seconds[1]) / 2
        decoding = max(0.0, seconds[1] - evaluation)
        runs = [case for case in options.cases if case != "base"]
        evaluations = len(options.cases) * sum(options.sampling_steps) + OWN_STEPS * ("base" in options.cases)
        settings = len(options.cases) * len(options.sampling_steps) + ("base" in options.cases)
        # A training step with LoRA on all layers took four evaluations of its images; a start takes 15 seconds.
        training = len(runs) * (options.steps * options.batch * 4 * evaluation + 15)
        sampling = options.images * (evaluations * evaluation + settings * (decoding + 0.03))  # 30 ms for both features
        print(
            f"{size} px: {1e3 * evaluation:.1f} ms for an evaluation and {1e3 * decoding:.1f} ms for a decoding of an"
            f" image; {training / 60:.0f} min of training and {sampling / 60:.0f} min of sampling for each seed"
        )
        total += (training + sampling) * len(options.seeds) / 60
    print(f"about {total:.0f} minutes of one CPU core in all", flush=True)
    return total


def main() -> None:
    """Run the cases, or print the table."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # At this size, dividing an operation among threads costs more than it saves.
    if not options.table:
        estimate(options)
        if options.estimate:
            return
        same_options(options_of_files(options.output.glob("* real *.npz")), options_of_images(options))
        for case in options.cases:
            same_options(options_of_files(options.output.glob(f"* {case} *.npz")), options_of_row(case, options))
        for seed in options.seeds:
            for size in options.sizes:
                paths = {case: options.output / f"{size} {case} {seed}.npz" for case in options.cases}
                missing = [case for case, path in paths.items() if not path.exists()]
                if not missing:
                    continue
                captions = captions_of(options.pictures, size, options.images, options.reference_images, seed)
                real: dict[str, Array | float | str] = {"options": json.dumps(options_of_images(options))}
                for name, space in captions.spaces.items():
                    both = np.concatenate([captions.real[name], space.reference])
                    real[f"{name} reference"] = space.reference
                    real[f"{name} floor"] = real_floor(both, options.images, len(space.reference), seed=seed)
                np.savez(options.output / f"{size} real {seed}.npz", **real)  # type: ignore[arg-type]
                for case in missing:
                    run(case, size, seed, options, captions)
    for case in ("real", *CASES):
        same_options(options_of_files(options.output.glob(f"* {case} *.npz")))
    print("\n".join(table(options.output, options.repeats)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the features of each case")
    parser.add_argument("--table", action="store_true", help="print the tables of what is in the folder, and stop")
    parser.add_argument("--estimate", action="store_true", help="print how long the cases will take, and stop")
    text = "folder with SIZE/train and SIZE/test (%(default)s)"
    parser.add_argument("--pictures", type=Path, default=Path("emoji"), help=text)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=DEFAULT_CASES, help="cases (base and LoRA)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 64], help="sides in pixels (48 64)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (0)")
    parser.add_argument("--steps", type=int, default=160, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images in a training step (%(default)s)")
    text = "highest learning rate (1e-3 for LoRA, 3e-4 for full)"
    parser.add_argument("--learning_rate", type=float, help=text)
    parser.add_argument("--warmup", type=int, default=20, help="steps to the highest learning rate (%(default)s)")
    parser.add_argument("--images", type=int, default=500, help="captions that are generated (%(default)s)")
    text = "real images that generated ones are compared with (%(default)s)"
    parser.add_argument("--reference_images", type=int, default=2000, help=text)
    text = f"numbers of sampling steps ({' '.join(map(str, STEPS))}; the base also has {OWN_STEPS})"
    parser.add_argument("--sampling_steps", type=int, nargs="+", default=STEPS, help=text)
    parser.add_argument("--repeats", type=int, default=200, help="resamplings behind the intervals (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
