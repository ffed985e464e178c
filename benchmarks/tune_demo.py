"""Choose the demo's learning rates, each objective's own, and write them beside the demo.

    python benchmarks/tune_demo.py

Every objective is trained at every rate with the demo's settings but another seed, on names that are divided anew: the
names that the demo measures on are in neither part. The rate whose best sampler has the smallest Fréchet distance at
the number of evaluations of the demo's curves wins, and that sampler draws the objective's curve.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2f_fast.alignment import NaiveFlow
from d2f_fast.checkpoint import write_json
from d2f_fast.demo.exam import Exam, noise_of
from d2f_fast.demo.run import CHOICES, OBJECTIVES, DemoSettings, StylePictures, training_config
from d2f_fast.demo.sampling import ROUTES, Painter
from d2f_fast.miniature import load_miniature, pictures
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.trainer import AlignedTrainer

SEED = 1
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def split_names(seed: int) -> tuple[list[int], list[int]]:
    """Names to train on, and as many to measure on as the demo holds out; none of the demo's held-out ones."""
    held_out = pictures.held_out_names()
    rest = np.array([name for name in pictures.names_in_both_styles() if name not in held_out])
    order = np.random.default_rng(seed).permutation(len(rest))
    return rest[order[len(held_out) :]].tolist(), rest[order[: len(held_out)]].tolist()


def measure(trainer: AlignedTrainer, exam: Exam, settings: DemoSettings) -> list[dict[str, Any]]:
    """A row for each sampler."""
    config, steps = trainer.config, settings.steps_of_curves
    reader = NaiveFlow(trainer.alignment.num_train_timesteps) if config.objective == "fm" else trainer.alignment
    painter = Painter(trainer.model, reader, settings.guidance_scale)
    rows = []
    with trainer.averaged():
        for route in ROUTES:
            drawn = painter.draw(exam.prompts, noise_of(exam.count, trainer.model, SEED), route, steps)
            rows.append(
                {
                    "objective": config.objective,
                    "learning_rate": config.learning_rate,
                    "sampler": route.sampler,
                    "spacing": route.spacing,
                    "steps": steps,
                    **exam.measure(drawn, settings.repeats),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHOICES, help="JSON file to write")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to try")
    options = parser.parse_args()
    settings = DemoSettings()
    names, measured = split_names(SEED)
    exam = Exam(measured, settings.pictures[settings.steps_of_curves], load_classifier(), SEED)
    dataset, rows = StylePictures(names), []
    with tempfile.TemporaryDirectory() as folder:
        for objective in OBJECTIVES:
            for rate in options.rates:
                run = Path(folder) / f"{rate}"
                config = training_config(settings, objective, rate, SEED, run)
                config = dataclasses.replace(config, cache_dir=str(Path(folder) / "cache"))
                trainer = AlignedTrainer.from_pretrained(load_miniature(), config)
                trainer.fit(dataset)
                rows += measure(trainer, exam, settings)
                print(*(f"{row['sampler']} {row['frechet_distance']:.3f}" for row in rows[-len(ROUTES) :]))
    chosen = {}
    for objective in OBJECTIVES:
        row = min((r for r in rows if r["objective"] == objective), key=lambda r: r["frechet_distance"])
        chosen[objective] = {key: row[key] for key in ("learning_rate", "sampler", "spacing", "frechet_distance")}
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
