"""Train the miniature to predict depth by several objectives, and compare the depth at several numbers of steps.

    python -m d2f_fast.miniature.rooms rooms/train --split train
    python -m d2f_fast.miniature.rooms rooms/test --split test
    python -m benchmarks.depth_table --output depth_table --cases lora_diff2flow lora_diffusion --seeds 0 1 2
    python -m benchmarks.depth_table --output depth_table --table

Each case is one run of `d2f train --task depth`, whose folder `pipeline` is then measured as `d2f evaluate` does. A
case that is already in the folder is not trained again, and is refused where other options made it. The table has the
means over the images and the seeds, with 95 % intervals from resampling the images; they do not include other seeds of
the training. A second table has the AbsRel of the case `diff2flow` as a share of that of each other case, on the same
images and the seeds that both have.

The cases `one_step` learn the depth as one step from zeros in place of noise, the recipe of "Fine-Tuning
Image-Conditional Diffusion Models is Easier than You Think" (arXiv 2409.11355) with the loss of the latents, and are
measured at 1 step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.kept_rows import same_options
from d2f_fast.evaluation.depth import DepthErrors
from d2f_fast.evaluation.distances import bootstrap_interval
from d2f_fast.files.json_file import write_json

STEPS = (1, 2, 4, 10, 50)
OBJECTIVES: dict[str, dict[str, str]] = {
    "diff2flow": {"objective": "diff2flow"},
    "fm_published": {"objective": "fm", "fm_form": "published"},
    "fm_diffusers": {"objective": "fm", "fm_form": "diffusers"},
    "diffusion": {"objective": "diffusion"},
    "one_step": {"objective": "diff2flow", "distill": ""},
}
ADAPTERS = {"lora": {"adapter": "lora", "rank": "64", "conv_rank": "64"}, "full": {"adapter": "full"}}
CASES = {
    f"{adapter}_{objective}": {**ADAPTERS[adapter], **options}
    for adapter in ADAPTERS
    for objective, options in OBJECTIVES.items()
}
TRAINING = {
    "task": "depth",
    "pretrained_model_name_or_path": "miniature",
    "resolution": "64",
    "train_batch_size": "8",
    "lr_scheduler": "cosine",
    "ema_decay": "0.99",
    "checkpointing_steps": "0",
}
TITLES = {"abs_rel": "AbsRel, lower is better", "delta1": "δ1, higher is better"}


def arguments(case: str, seed: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of the training of a case, without the name of the program.

    An option whose value is "" is a switch.
    """
    chosen = {
        **TRAINING,
        **CASES[case],
        "train_data_dir": str(options.rooms / "train"),
        "max_train_steps": str(options.steps),
        "learning_rate": str(options.learning_rate),
        "lr_warmup_steps": str(options.warmup),
        "seed": str(seed),
        "output_dir": str(folder),
    }
    return ["train", *(word for name, value in chosen.items() for word in (f"--{name}", value) if word)]


def steps_of(case: str, options: argparse.Namespace) -> tuple[int, ...]:
    """Return the numbers of sampling steps at which a case is measured."""
    return (1,) if "distill" in CASES[case] else tuple(options.sampling_steps)


def options_of_row(options: argparse.Namespace) -> dict[str, object]:
    """Return the options that decide a row."""
    names = "split", "images", "sampling_steps", "steps", "learning_rate", "warmup"
    return {"rooms": str(options.rooms.resolve()), **{name: getattr(options, name) for name in names}}


def measure(case: str, folder: Path, options: argparse.Namespace) -> dict[str, list[DepthErrors]]:
    """Return the errors of each image at each number of steps."""
    from d2f_fast.commands.depth_model import load_depth_model
    from d2f_fast.data.depth_data import find_depth_images
    from d2f_fast.data.depth_options import DepthOptions
    from d2f_fast.models.options import ModelOptions
    from d2f_fast.tasks.depth import measure_depth

    aligned = OBJECTIVES[case.partition("_")[2]]["objective"] == "diff2flow"
    model = load_depth_model(str(folder / "pipeline"), (), ModelOptions(), "flow" if aligned else "saved")
    images = find_depth_images(options.rooms / options.split, DepthOptions())
    measured = {}
    for steps in steps_of(case, options):
        with tqdm(total=options.images, desc=f"{case}, {steps} steps", unit="image") as bar:
            progress = lambda done, bar=bar: bar.update()  # noqa: E731
            measured[str(steps)] = measure_depth(model, images, options.images, progress, steps=steps, seed=0)
    return measured


def run(case: str, seed: int, options: argparse.Namespace) -> None:
    """Train and measure one case, and write its errors, unless they are there."""
    path = options.output / f"{case}-{seed}.json"
    if path.exists():
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        words = arguments(case, seed, options, folder)
        subprocess.run([sys.executable, "-m", "d2f_fast", *words], check=True)
        trained = time.monotonic()
        measured = measure(case, folder, options)
    write_json(
        path,
        {
            "case": case,
            "seed": seed,
            "options": options_of_row(options),
            "training_seconds": round(trained - started),
            "measuring_seconds": round(time.monotonic() - trained),
            "errors": {steps: [error._asdict() for error in errors] for steps, errors in measured.items()},
        },
    )


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """Return the rows in a folder, by the names of their files."""
    return {str(path): json.loads(path.read_text()) for path in sorted(output.glob("*.json"))}


def table(output: Path) -> list[str]:
    """Return the lines of a table of all cases in a folder."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(output).values():
        runs.setdefault(row["case"], []).append(row)
    lines = ["| case | seeds | steps | " + " | ".join(TITLES.values()) + " |", "|---|---|---|" + "---|" * len(TITLES)]
    for case in filter(runs.__contains__, CASES):
        seeds = ", ".join(str(row["seed"]) for row in runs[case])
        for steps in runs[case][0]["errors"]:
            cells = []
            for name in TITLES:
                errors = np.mean([[e[name] for e in row["errors"][steps]] for row in runs[case]], axis=0)
                interval = bootstrap_interval(np.mean, errors, repeats=1000)
                cells.append(f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})")
            lines.append(f"| {case} | {seeds} | {steps} | " + " | ".join(cells) + " |")
    return lines


def comparison(output: Path) -> list[str]:
    """Return the lines of a table of the mean AbsRel of the aligned objective, as a share of that of each other one."""
    errors: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in rows_of(output).values():
        measured = {steps: [error["abs_rel"] for error in found] for steps, found in row["errors"].items()}
        errors.setdefault(row["case"], {})[row["seed"]] = measured
    lines = ["| AbsRel of | as a share of that of | seeds | steps | share |", "|---|---|---|---|---|"]
    for case in filter(errors.__contains__, CASES):
        own = f"{case.partition('_')[0]}_diff2flow"
        seeds = sorted(errors[case].keys() & errors.get(own, {}).keys())
        if case == own or not seeds:
            continue
        for steps in errors[case][seeds[0]]:
            means = np.stack([np.mean([errors[name][seed][steps] for seed in seeds], axis=0) for name in (own, case)])
            share = bootstrap_interval(lambda pairs: pairs[:, 0].mean() / pairs[:, 1].mean(), means.T, repeats=1000)
            counted = ", ".join(map(str, seeds))
            lines.append(
                f"| {own} | {case} | {counted} | {steps} | {share.value:.2f} ({share.low:.2f} to {share.high:.2f}) |"
            )
    return lines


def main() -> None:
    """Run the cases, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the errors of each case")
    parser.add_argument("--table", action="store_true", help="print the table of what is in the folder, and stop")
    parser.add_argument("--rooms", type=Path, default=Path("rooms"), help="folder of train and test (%(default)s)")
    parser.add_argument("--split", default="test", help="rooms that are measured (%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="cases (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="steps to the highest learning rate (%(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images that are measured (%(default)s)")
    text = f"numbers of sampling steps ({' '.join(map(str, STEPS))})"
    parser.add_argument("--sampling_steps", type=int, nargs="+", default=STEPS, help=text)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = rows_of(options.output)
    for case in options.cases:
        kept = {name: row.get("options") for name, row in rows.items() if row["case"] == case}
        same_options(kept, None if options.table else options_of_row(options))
    if not options.table:
        for seed in options.seeds:
            for case in options.cases:
                run(case, seed, options)
    print("\n".join([*table(options.output), "", *comparison(options.output)]))


if __name__ == "__main__":
    main()
