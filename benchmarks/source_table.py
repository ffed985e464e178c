"""Train the miniature to restore images by several objectives, and compare the results at several numbers of steps.

    python -m benchmarks.source_table --output source_table --seeds 0 1 2
    python -m benchmarks.source_table --output source_table --table

The tasks are super-resolution (16 × 16 pixels, enlarged to 32 × 32 by bicubic interpolation) and the repair of JPEG
images of quality 10. The images are emoji of the style "fluent", which the base has not seen; the measured ones have
names that were not trained. Each case is one run of `d2f train --task image_to_image`, without captions. A case that is
already in the folder is not trained again, and is refused where other options made it.

PSNR is the mean over the images and the seeds, with a 95 % interval from resampling the images; it does not include
other seeds of the training. The Fréchet distance compares the features of the results, by the classifier inside the
package, with those of the targets: 0 for perfect results. The rows "source" and "autoencoder" need no network: the
source image itself, and the target after the autoencoder alone, which no result can be expected to exceed.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.kept_rows import same_options
from d2f_fast.evaluation.distances import bootstrap_interval, frechet_distance
from d2f_fast.files.json_file import write_json
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import Classifier, load_classifier
from d2f_fast.models.base_model import BaseModel, to_pil

STEPS = (1, 2, 4, 10)
TASKS = ("super_resolution", "jpeg")
OBJECTIVES: dict[str, dict[str, str]] = {
    "diff2flow": {"objective": "diff2flow"},
    "fm_published": {"objective": "fm", "fm_form": "published"},
    "fm_diffusers": {"objective": "fm", "fm_form": "diffusers"},
}
SHARES = ("0", "0.25")  # of noise in the start
CASES = {
    f"{task}_{objective}_{share}": {**options, "source_noise": share}
    for task in TASKS
    for share in SHARES
    for objective, options in OBJECTIVES.items()
}
TRAINING = {
    "task": "image_to_image",
    "pretrained_model_name_or_path": "miniature",
    "rank": "64",
    "conv_rank": "64",
    "first_last_layers": "True",
    "train_batch_size": "8",
    "lr_scheduler": "cosine",
    "ema_decay": "0.99",
    "checkpointing_steps": "0",
}
STYLE, TRAINING_IMAGES, JPEG_QUALITY = "fluent", 2000, 10


def damaged(image: Image.Image, task: str) -> Image.Image:
    """Return an image as the task's source."""
    if task == "super_resolution":
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=JPEG_QUALITY)
    with Image.open(file) as stored:
        return stored.convert("RGB")


def targets(names: Sequence[int], count: int, seed: int) -> list[Image.Image]:
    """Return images of random pairs of a name and a background, each pair once."""
    random = np.random.default_rng(seed)
    pairs = [(name, colour) for name in names for colour in range(len(emoji.BACKGROUNDS))]
    chosen = [pairs[i] for i in random.permutation(len(pairs))[:count]]
    items = [emoji.Emoji(*pair, mirrored=bool(random.random() < 0.5)) for pair in chosen]
    return to_pil(emoji.render(items, STYLE))


def write_training_images(folder: Path, task: str) -> None:
    """Write the training pairs of a task, unless they are there."""
    if (folder / "complete").exists():
        return
    held_out = emoji.held_out_names()
    known = [name for name in emoji.names_in_both_styles() if name not in held_out]
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(targets(known, TRAINING_IMAGES, seed=0)):
        image.save(folder / f"target/{number:04d}.png")
        damaged(image, task).save(folder / f"source/{number:04d}.png")
    (folder / "complete").touch()


def psnr(images: Sequence[Image.Image], wanted: Sequence[Image.Image]) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each image in dB; 99 where it is exact."""
    both = (np.stack([np.asarray(image, np.float64) for image in group]) for group in (images, wanted))
    errors = np.square(np.subtract(*both)).mean((1, 2, 3))
    ratios: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(errors, 255**2 * 10**-9.9))
    return ratios


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return images as [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def measured(images: Sequence[Image.Image], wanted: Sequence[Image.Image], classifier: Classifier) -> dict[str, Any]:
    """Return what the table shows of images."""
    found, right = (classifier.features(pixels(group)).double().numpy() for group in (images, wanted))
    return {
        "psnr": [round(each, 4) for each in psnr(images, wanted)],
        "frechet_distance": frechet_distance(found, right),
    }


def arguments(case: str, seed: int, options: argparse.Namespace, data: Path, folder: Path) -> list[str]:
    """Return the command line of the training of a case, without the name of the program."""
    chosen = {
        **TRAINING,
        **CASES[case],
        "train_data_dir": str(data),
        "cache_dir": str(options.output / "cache"),
        "max_train_steps": str(options.steps),
        "learning_rate": str(options.learning_rate),
        "lr_warmup_steps": str(min(options.warmup, options.steps - 1)),
        "seed": str(seed),
        "output_dir": str(folder),
    }
    return ["train", *(word for name, value in chosen.items() for word in (f"--{name}", value))]


def options_of_row(case: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the options that decide the row of a case; those of a row without a training are the images alone."""
    if case not in CASES:
        return {"images": options.images}
    names = "images", "sampling_steps", "steps", "learning_rate", "warmup"
    return {name: getattr(options, name) for name in names}


def measure(case: str, folder: Path, options: argparse.Namespace, wanted: list[Image.Image]) -> dict[str, Any]:
    """Return what was measured of a trained LoRA at each number of steps."""
    from d2f_fast.commands.load_model import load_with_lora
    from d2f_fast.models.options import ModelOptions
    from d2f_fast.models.solve import Sampling, generate_images
    from d2f_fast.models.source_start import start_of_flow

    loaded = load_with_lora("miniature", [str(folder)], ModelOptions(), None)
    model, classifier, found = BaseModel(loaded.pipeline, None, loaded.facts), load_classifier(), {}
    task = next(task for task in TASKS if case.startswith(task))
    sources, share = [damaged(image, task) for image in wanted], float(CASES[case]["source_noise"])
    start = start_of_flow(model, sources, 32, 32, share, torch.Generator().manual_seed(0))
    for steps in tqdm(options.sampling_steps, desc=case, unit="setting"):
        sampling = Sampling(
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=32,
            width=32,
            scheduler_options=loaded.scheduler_options,
        )
        images = [
            image
            for part in torch.split(start, 32)
            for image in generate_images(model, [""] * len(part), sampling, noise=part)
        ]
        found[str(steps)] = measured(images, wanted, classifier)
    return found


def write_baselines(options: argparse.Namespace, wanted: list[Image.Image]) -> None:
    """Measure what needs no training, unless it is in the folder."""
    output = options.output
    if all((output / f"{task}_autoencoder.json").exists() for task in TASKS):
        return
    model, classifier = BaseModel.load("miniature"), load_classifier()
    through = to_pil(model.decode(model.scale_latents(model.encode_images(pixels(wanted))["mean"])))
    for task in TASKS:
        rows = {"source": [damaged(image, task) for image in wanted], "autoencoder": through}
        for name, images in rows.items():
            case = f"{task}_{name}"
            row = {"case": case, "seed": None, "options": options_of_row(case, options)}
            row["measured"] = {"0": measured(images, wanted, classifier)}
            write_json(output / f"{case}.json", row)


def run(case: str, seed: int, options: argparse.Namespace, wanted: list[Image.Image]) -> None:
    """Train and measure one case, and write what was measured, unless it is there."""
    path = options.output / f"{case}-{seed}.json"
    if path.exists():
        return
    task = next(task for task in TASKS if case.startswith(task))
    data, started = options.output / "images" / task, time.monotonic()
    write_training_images(data, task)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        words = arguments(case, seed, options, data, folder)
        subprocess.run([sys.executable, "-m", "d2f_fast", *words], check=True)
        trained = time.monotonic()
        found = measure(case, folder, options, wanted)
    write_json(
        path,
        {
            "case": case,
            "seed": seed,
            "options": options_of_row(case, options),
            "training_seconds": round(trained - started),
            "measuring_seconds": round(time.monotonic() - trained),
            "measured": found,
        },
    )


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """Return the rows in a folder, by the names of their files."""
    return {str(path): json.loads(path.read_text()) for path in sorted(output.glob("*.json"))}


def check_options(options: argparse.Namespace) -> None:
    """End the program where a row of the folder was made with other options than those that it would have now."""
    rows = rows_of(options.output)
    cases = {row["case"] for row in rows.values()}
    for case in cases & {*options.cases} | cases - {*CASES}:
        kept = {name: row.get("options") for name, row in rows.items() if row["case"] == case}
        same_options(kept, None if options.table else options_of_row(case, options))


def table(output: Path) -> list[str]:
    """Return the lines of a table of all cases in a folder."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(output).values():
        runs.setdefault(row["case"], []).append(row)
    lines = ["| case | seeds | evaluations | PSNR in dB, higher is better | Fréchet distance, lower is better |"]
    lines.append("|---|---|---|---|---|")
    order = [name for task in TASKS for name in (f"{task}_source", f"{task}_autoencoder")]
    for case in filter(runs.__contains__, [*order, *CASES]):
        seeds = ", ".join(str(row["seed"]) for row in runs[case] if row["seed"] is not None)
        for steps in runs[case][0]["measured"]:
            found = [row["measured"][steps] for row in runs[case]]
            interval = bootstrap_interval(np.mean, np.mean([each["psnr"] for each in found], axis=0), repeats=1000)
            cells = f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
            distance = np.mean([each["frechet_distance"] for each in found])
            lines.append(f"| {case} | {seeds} | {steps} | {cells} | {distance:.2f} |")
    return lines


def main() -> None:
    """Run the cases, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for what was measured of each case")
    parser.add_argument("--table", action="store_true", help="print the table of what is in the folder, and stop")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="cases (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="steps to the highest learning rate (%(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images that are measured (%(default)s)")
    text = f"numbers of sampling steps ({' '.join(map(str, STEPS))})"
    parser.add_argument("--sampling_steps", type=int, nargs="+", default=STEPS, help=text)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    check_options(options)
    if not options.table:
        wanted = targets(sorted(emoji.held_out_names()), options.images, seed=1)
        write_baselines(options, wanted)
        for seed in options.seeds:
            for case in options.cases:
                run(case, seed, options, wanted)
    print("\n".join(table(options.output)))


if __name__ == "__main__":
    main()
