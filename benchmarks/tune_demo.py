"""Choose a learning rate for each network of the demo, and write the choices beside the demo.

    python benchmarks/tune_demo.py
    python benchmarks/tune_demo.py --networks fm_paper    # keeps the rows of the other networks

Every network is trained at every rate with the demo's settings but another seed and another division of the names; the
names that the demo measures on are left out. The rate whose best sampler has the smallest Fréchet distance, at the
number of evaluations of the demo's curves, is chosen, and that sampler makes the network's curve.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2f_fast.demo.exam import Exam, noise_of
from d2f_fast.demo.run import CHOICES, NETWORKS, DemoSettings, StylePictures, make_trainer, with_merged_unet
from d2f_fast.demo.sampling import ROUTES, Painter, one_thread_an_operation
from d2f_fast.files.json_file import write_json
from d2f_fast.miniature import load_miniature, pictures
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.training.trainer import AlignedTrainer

SEED = 1
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def split_names(seed: int) -> tuple[list[int], list[int]]:
    """Divide the names that the demo does not hold out into those to train on and those to measure on.

    There are as many to measure on as the demo holds out.
    """
    held_out = pictures.held_out_names()
    rest = np.array([name for name in pictures.names_in_both_styles() if name not in held_out])
    order = np.random.default_rng(seed).permutation(len(rest))
    return rest[order[len(held_out) :]].tolist(), rest[order[: len(held_out)]].tolist()


def measure(trainer: AlignedTrainer, network: str, exam: Exam, settings: DemoSettings) -> list[dict[str, Any]]:
    """Return a row for each sampler."""
    steps = settings.steps_of_curves
    with trainer.averaged():
        model = with_merged_unet(trainer.model)
    painter, noise = Painter(model, trainer.objective.flow, settings.guidance_scale), noise_of(exam.count, model, SEED)
    return [
        {
            "objective": network,
            "learning_rate": trainer.config.learning_rate,
            "sampler": route.sampler,
            "spacing": route.spacing,
            "steps": steps,
            **exam.measure(painter.draw(exam.prompts, noise, route, steps), settings.repeats),
        }
        for route in ROUTES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHOICES, help="JSON file to write (default: that of the demo)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to try (default: %(default)s)"
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to try again (default: all)"
    )
    options = parser.parse_args()
    settings = DemoSettings()
    names, measured = split_names(SEED)
    exam = Exam(measured, settings.pictures[settings.steps_of_curves], load_classifier(), SEED)
    dataset, rows = StylePictures(names), []
    kept = [name for name in NETWORKS if name not in options.networks]
    if kept:
        rows = [row for row in json.loads(options.output.read_text())["tried"] if row["objective"] in kept]
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            for rate in options.rates:
                trainer = make_trainer(load_miniature, settings, network, rate, SEED, Path(folder))
                with one_thread_an_operation():
                    trainer.fit(dataset)
                rows += measure(trainer, network, exam, settings)
                found = (f"{row['sampler']} {row['frechet_distance']:.3f}" for row in rows[-len(ROUTES) :])
                print(network, rate, *found, flush=True)
    chosen = {}
    for network in NETWORKS:
        row = min((r for r in rows if r["objective"] == network), key=lambda r: r["frechet_distance"])
        chosen[network] = {key: row[key] for key in ("learning_rate", "sampler", "spacing", "frechet_distance")}
    write_json(
        options.output,
        {
            "seed": SEED,
            "training_steps": settings.steps,
            "torch": torch.__version__,
            "chosen": chosen,
            "tried": rows,
        },
    )
    print(options.output)


if __name__ == "__main__":
    main()
