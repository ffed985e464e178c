"""List what a row of the demo's `metrics.json` holds, and select rows."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from d2f_fast.config import Spacing
from d2f_fast.demo.samplers import Sampler, SamplerName

Verdict = Literal["better", "worse", "level"]


class Measured(TypedDict, total=False):
    """What is measured of one set of images; only a network's best sampler has the ImageNet entries.

    Keys:
        samples: number of images.
        frechet_distance, frechet_low, frechet_high: Fréchet distance to real images in the classifier's features, and
            its 95 % interval.
        frechet_floor: distance of as many real images to other real ones.
        background_accuracy, background_samples: fraction of images with the captioned background colour, and how many
            images were counted.
        name_top1, name_top5: fraction of images whose name is the classifier's first guess, or among its first five.
        imagenet_…: the same distances in the features of a network trained on ImageNet.
        equal_to: sampler that generates the same images, and whose figures these are.
    """

    samples: int
    frechet_distance: float
    frechet_low: float
    frechet_high: float
    frechet_floor: float
    background_accuracy: float
    background_samples: int
    name_top1: float
    name_top5: float
    imagenet_frechet_distance: float
    imagenet_frechet_low: float
    imagenet_frechet_high: float
    imagenet_frechet_floor: float
    equal_to: SamplerName


class Row(Measured, total=False):
    """One row of the results; which keys it has depends on `measure`.

    Keys:
        measure: "quality", "training", "grey_bias", "gaussian_grey_bias", "autoencoder", "comparison" or
            "steps_to_reach".
        objective: name of the network ("base", or a key of `NETWORKS`), "real" or "ideal".
        adapter: "lora" or "none".
        sampler, spacing: sampler, and spacing of its nodes.
        steps: network evaluations for each image, guidance counted once.
        start: flow time at which sampling starts.
        training_steps: training steps so far; in "steps_to_reach" None if the distance was not reached.
        flow_loss: mean squared error of the velocity on held-out images.
        captions: group of captions, "no colour" or "black and white".
        grey_bias, grey_bias_low, grey_bias_high: spread of brightness divided by the real images', and its interval.
        latents, channel_mean_variance: shape of the Gaussian latents, and the variance of their channels' means.
        against, against_sampler, against_spacing, against_frechet_distance: network that is compared with, at its best.
        excess_ratio: its distance above the real images', divided by ours; None if either is not above them.
        verdict: whether our distance is "better", "worse" or "level", which means that the intervals overlap.
        budget: training steps of a whole run.
    """

    measure: str
    objective: str
    adapter: Literal["lora", "none"]
    sampler: SamplerName | Literal["none"]
    spacing: Spacing
    steps: int
    start: float
    training_steps: int | None
    flow_loss: float
    captions: str
    grey_bias: float
    grey_bias_low: float
    grey_bias_high: float
    latents: list[int]
    channel_mean_variance: float
    against: str
    against_sampler: SamplerName | Literal["none"]
    against_spacing: Spacing
    against_frechet_distance: float
    excess_ratio: float | None
    verdict: Verdict
    budget: int


def sampling_row(measure: str, objective: str, sampler: Sampler, steps: int) -> Row:
    """Return the first entries of a row: what was measured of which network, with which sampler."""
    return {
        "measure": measure,
        "objective": objective,
        "adapter": "none" if objective == "base" else "lora",
        "sampler": sampler.name,
        "spacing": sampler.spacing,
        "steps": steps,
    }


def sampler_of(row: Row) -> Sampler:
    """Return the sampler of a row."""
    name = row["sampler"]
    if name == "none":
        raise ValueError(f"a row of {row['measure']!r} has no sampler")
    return Sampler(name, row["spacing"])


def select(rows: Sequence[Row], measure: str, **entries: object) -> list[Row]:
    """Return the rows of one measure that have all of these entries."""
    return [
        row
        for row in rows
        if row["measure"] == measure and all(row.get(key) == value for key, value in entries.items())
    ]


def training_curve(rows: Sequence[Row], objective: str) -> list[tuple[int, Row]]:
    """Return the (training steps, row) pairs of one network's training curve, in the order of training."""
    found = [(row["training_steps"], row) for row in select(rows, "training", objective=objective)]
    return sorted(((step, row) for step, row in found if step is not None), key=lambda pair: pair[0])
