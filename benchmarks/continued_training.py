"""Train the miniature further on its own style, as the demo does, with several seeds and learning rates.

    python -m benchmarks.continued_training --seeds 1 2 3 --rates 5e-4 1e-3 2e-3

One line for each measured point: network, learning rate, seed, training steps, and the Fréchet distance at the demo's
number of network evaluations.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

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
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.classifier import load_classifier


def measure_run(network: str, rate: float, seed: int, settings: DemoSettings, captions: EvaluationSet) -> None:
    """Train one network, and print its distance at each point."""
    measurements = Measurements(settings, captions, captions, captions, seed, tqdm(disable=True))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(load_miniature, settings, network, rate, seed, Path(folder))
        dataset = EmojiDataset(training_items(range(len(emoji.names())), seed), "noto")

        def measure(step: int) -> None:
            model = with_merged_unet(trainer.model)
            measurements.measure_training(model, trainer.objective.flow, network, step, rate)
            row = measurements.rows[-1]
            print(
                f"{network}, learning rate {rate:g}, seed {seed}, {step} steps: distance {row['frechet_distance']:.2f}"
                f" ({row['frechet_low']:.2f} to {row['frechet_high']:.2f}), real images {row['frechet_floor']:.2f}",
                flush=True,
            )

        train_in_parts(trainer, dataset, settings.curve_points, measure)


def main() -> None:
    """Train every network with every seed and learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds (%(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="learning rates (%(default)s)")
    parser.add_argument("--networks", nargs="+", choices=CONTINUED, default=list(CONTINUED), help="networks (all)")
    parser.add_argument("--images", type=int, default=500, help="images at each point (%(default)s)")
    parser.add_argument("--points", type=int, nargs="+", default=[0, 20, 160], help="measured steps (%(default)s)")
    options = parser.parse_args()
    settings = replace(DemoSettings(), curve_points=tuple(options.points), images=options.images)
    for seed in options.seeds:
        names = range(len(emoji.names()))
        captions = EvaluationSet(names, options.images, load_classifier(), "noto", settings.reference_images, seed)
        for rate in options.rates:
            for network in options.networks:
                measure_run(network, rate, seed, settings, captions)


if __name__ == "__main__":
    main()
