"""Tune the demo's learning rate for each network, and write the result beside the demo.

    python benchmarks/tune_demo.py
    python benchmarks/tune_demo.py --networks fm_paper    # keeps the rows of the other networks

Every network is trained at every rate with the demo's settings but another seed, on names that are divided anew: the
names that the demo measures are in neither part. The best rate is the one whose best sampler has the smallest Fréchet
distance at the number of evaluations of the demo's training curves; that sampler generates the network's curve.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.generation import ImageGenerator, single_threaded_operations, start_noise
from d2f_fast.demo.networks import NETWORKS, StyleDataset, make_trainer, with_merged_unet
from d2f_fast.demo.rows import Measured
from d2f_fast.demo.samplers import SAMPLERS
from d2f_fast.demo.settings import TUNED_FILE, DemoSettings
from d2f_fast.files.json_file import write_json
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.training.trainer import AlignedTrainer

SEED = 1
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


class TriedRow(Measured):
    """What one sampler gives after training at one learning rate."""

    objective: str
    learning_rate: float
    sampler: str
    spacing: str
    steps: int


def split_names(seed: int) -> tuple[list[int], list[int]]:
    """Divide the names at random, without the demo's held-out ones.

    Returns:
        Names to train on, and names to measure, as many as the demo holds out.
    """
    held_out = emoji.held_out_names()
    rest = np.array([name for name in emoji.names_in_both_styles() if name not in held_out])
    order = np.random.default_rng(seed).permutation(len(rest))
    return rest[order[len(held_out) :]].tolist(), rest[order[: len(held_out)]].tolist()


def measure(
    trainer: AlignedTrainer, network: str, evaluation_set: EvaluationSet, settings: DemoSettings
) -> list[TriedRow]:
    """Measure a trained network with each sampler."""
    steps = settings.curve_evaluations
    with trainer.averaged():
        model = with_merged_unet(trainer.model)
    generator = ImageGenerator(model, trainer.objective.flow, settings.guidance_scale)
    prompts, noise = evaluation_set.prompts, start_noise(evaluation_set.count, model, SEED)
    return [
        {
            "objective": network,
            "learning_rate": trainer.config.learning_rate,
            "sampler": sampler.name,
            "spacing": sampler.spacing,
            "steps": steps,
            **evaluation_set.measure(generator.generate(prompts, noise, sampler, steps), settings.bootstrap_repeats),
        }
        for sampler in SAMPLERS
    ]


def main() -> None:
    """Train and measure, and write the best learning rates and all rows to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TUNED_FILE, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to try (%(default)s)")
    text = "networks to train; others keep the rows that the output file has (default: all)"
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help=text)
    options = parser.parse_args()
    settings = DemoSettings()
    names, measured = split_names(SEED)
    evaluation_set = EvaluationSet(measured, settings.images[settings.curve_evaluations], load_classifier(), SEED)
    dataset = StyleDataset(names)
    rows: list[TriedRow] = []
    kept = [name for name in NETWORKS if name not in options.networks]
    if kept:
        rows = [row for row in json.loads(options.output.read_text())["tried"] if row["objective"] in kept]
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            for rate in options.rates:
                trainer = make_trainer(load_miniature, settings, network, rate, SEED, Path(folder))
                with single_threaded_operations():
                    trainer.fit(dataset)
                rows += measure(trainer, network, evaluation_set, settings)
                found = (f"{row['sampler']} {row['frechet_distance']:.3f}" for row in rows[-len(SAMPLERS) :])
                print(network, rate, *found, flush=True)
    write_tuned(options.output, rows, settings)
    print(options.output)


def write_tuned(path: Path, rows: list[TriedRow], settings: DemoSettings) -> None:
    """Write the best row of each network, and all rows, to the JSON file that `TunedSettings` reads."""
    chosen = {}
    for network in NETWORKS:
        row = min((r for r in rows if r["objective"] == network), key=lambda r: r["frechet_distance"])
        chosen[network] = {
            "learning_rate": row["learning_rate"],
            "sampler": row["sampler"],
            "spacing": row["spacing"],
            "frechet_distance": row["frechet_distance"],
        }
    write_json(
        path,
        {
            "seed": SEED,
            "training_steps": settings.training_steps,
            "torch": torch.__version__,
            "chosen": chosen,
            "tried": rows,
        },
    )


if __name__ == "__main__":
    main()
