"""Train the miniature further on its own style, as the demo does, with several seeds and learning rates.

    python -m benchmarks.continued_training --output continued --seeds 1 2 3 --rates 5e-4 1e-3 2e-3
    python -m benchmarks.continued_training --output continued --seeds 1 2 3 --rates 1e-4 3e-4 1e-3 --adapter full
    python -m benchmarks.continued_training --output continued --table

Each run is a file in the folder, with the Fréchet distance at each measured number of training steps, at the demo's
number of network evaluations. A run that is already there is not trained again,
and is refused where other options made it. The table has the mean over the seeds
of the distance minus that of other real images, and the lowest and highest of the seeds.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.kept_rows import same_options
from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.measurements import Measurements
from d2f_fast.demo.networks import (
    CONTINUED,
    EmojiDataset,
    make_trainer,
    train_in_parts,
    training_items,
    with_merged_unet,
)
from d2f_fast.demo.rows import Row
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.files.json_file import write_json
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.classifier import load_classifier


def measure_run(
    network: str, adapter: str, rate: float, seed: int, settings: DemoSettings, captions: EvaluationSet
) -> list[Row]:
    """Train one network, and return a row of each measured point."""
    measurements = Measurements(settings, captions, captions, captions, seed, tqdm(disable=True))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(load_miniature, settings, network, rate, seed, Path(folder), full=adapter == "full")
        dataset = EmojiDataset(training_items(range(len(emoji.names())), seed), "noto")

        def measure(step: int) -> None:
            model = with_merged_unet(trainer.model) if adapter == "lora" else trainer.model
            measurements.measure_training(model, trainer.objective.flow, network, step, rate)

        train_in_parts(trainer, dataset, settings.curve_points, measure)
    return measurements.rows


def table(folder: Path) -> list[str]:
    """Return the lines of a table of all runs in a folder."""
    runs: dict[tuple[str, str, float], list[list[Row]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        runs.setdefault((run["adapter"], run["network"], run["learning_rate"]), []).append(run["rows"])
    lines = []
    for (adapter, network, rate), seeds in sorted(runs.items()):
        cells = []
        for rows in zip(*seeds, strict=True):
            above = [row["frechet_distance"] - row["frechet_floor"] for row in rows]
            cells.append(f"{np.mean(above):.1f} ({min(above):.1f} to {max(above):.1f})")
        if not lines:
            points = [f"{row['training_steps']} steps" for row in seeds[0]]
            lines = ["| " + " | ".join(("adapter", "network", "learning rate", "seeds", *points)) + " |"]
            lines.append("|---" * (4 + len(points)) + "|")
        lines.append(f"| {adapter} | {network} | {rate:g} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Train every network with every seed and learning rate, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the rows of each run")
    parser.add_argument("--table", action="store_true", help="print the table of what is in the folder, and stop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="learning rates (%(default)s)")
    parser.add_argument("--networks", nargs="+", choices=CONTINUED, default=list(CONTINUED), help="networks (all)")
    parser.add_argument("--adapter", choices=("lora", "full"), default="lora", help="what is trained (%(default)s)")
    parser.add_argument("--images", type=int, default=500, help="images at each point (%(default)s)")
    parser.add_argument("--points", type=int, nargs="+", default=[0, 20, 160], help="measured steps (%(default)s)")
    options = parser.parse_args()
    kept = {str(path): json.loads(path.read_text()).get("options") for path in sorted(options.output.glob("*.json"))}
    own = {"images": options.images, "points": options.points}
    same_options(kept, None if options.table else own)
    if options.table:
        print("\n".join(table(options.output)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    settings = replace(DemoSettings(), curve_points=tuple(options.points), images=options.images)
    for seed in options.seeds:
        names = range(len(emoji.names()))
        captions = EvaluationSet(names, options.images, load_classifier(), "noto", settings.reference_images, seed)
        for rate in options.rates:
            for network in options.networks:
                path = options.output / f"{options.adapter}, {network}, {rate:g}, seed {seed}.json"
                if path.exists():
                    continue
                rows = measure_run(network, options.adapter, rate, seed, settings, captions)
                head = {"adapter": options.adapter, "network": network, "learning_rate": rate, "seed": seed}
                write_json(path, {**head, "options": own, "rows": rows})
                print(path.stem, [round(row["frechet_distance"], 1) for row in rows], flush=True)


if __name__ == "__main__":
    main()
