"""Sizes of the demo, and the learning rates and samplers that were tuned for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from d2f_fast.demo.samplers import Sampler

TUNED_FILE = Path(__file__).with_name("learning_rates.json")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of a demo.

    Args:
        training_steps: optimizer steps of each training run; a multiple of 32 puts every point of the training curves
            on a whole step.
        batch_size: images in one training step.
        rank: rank of the LoRA layers, which adapt attention and feed-forward layers as common LoRA files do.
        ema_decay: decay of the moving average of the trained weights, in [0, 1).
        guidance_scale: scale of classifier-free guidance for every generated image; 1 turns it off.
        images: number of images that each network generates with each sampler, by number of network evaluations.
        curve_images: number of images generated at each point of the training curves.
        brightness_images: number of images generated for each sampler and group of captions of the brightness
            measurement.
        curve_evaluations: network evaluations for each image of the training curves and of the brightness measurement.
        bootstrap_repeats: resamplings behind each interval of a Fréchet distance.
    """

    training_steps: int = 160
    batch_size: int = 32
    rank: int = 16
    ema_decay: float = 0.99
    guidance_scale: float = 2.0
    images: Mapping[int, int] = field(default_factory=lambda: {2: 200, 4: 200, 8: 128, 25: 48})
    curve_images: int = 128
    brightness_images: int = 1000
    curve_evaluations: int = 4
    bootstrap_repeats: int = 100

    def curve_points(self) -> list[int]:
        """Return the training steps at which a run is measured: 0, and the total halved up to five times."""
        return sorted({0} | {max(1, self.training_steps >> k) for k in range(6)})


@dataclass(frozen=True)
class TunedSettings:
    """Learning rate and curve sampler of each network.

    `benchmarks/tune_demo.py` chose them with another seed, on names that the demo does not measure.

    Args:
        learning_rate: learning rate by network.
        sampler: sampler of the training curve by network.
    """

    learning_rate: Mapping[str, float]
    sampler: Mapping[str, Sampler]

    @classmethod
    def read(cls, path: Path = TUNED_FILE) -> "TunedSettings":
        """Read the tuned settings from a JSON file; by default from the one in this package."""
        chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        return cls(
            {name: row["learning_rate"] for name, row in chosen.items()},
            {name: Sampler(row["sampler"], row["spacing"]) for name, row in chosen.items()},
        )
