"""List what a row of the demo's `metrics.json` holds, and select and compare rows."""

from collections.abc import Sequence
from typing import Literal, TypedDict

Section = Literal["same_images", "continued", "few_steps", "style"]
Verdict = Literal["better", "worse", "level"]


class Measured(TypedDict, total=False):
    """What is measured of one set of images.

    Keys:
        samples: number of images.
        frechet_distance, frechet_low, frechet_high: Fréchet distance to real images in the classifier's features, and
            its 95 % interval.
        frechet_floor: distance of as many real images to other real ones.
        name_top1, name_top5: fraction of images whose name is the classifier's first guess, or among its first five.
    """

    samples: int
    frechet_distance: float
    frechet_low: float
    frechet_high: float
    frechet_floor: float
    name_top1: float
    name_top5: float


class Row(Measured, total=False):
    """One row of the results; which keys it has depends on the section.

    Keys:
        section: section of the report.
        network: "base", "reflow", or a key of `NETWORKS`.
        objective: objective that the network was trained on, or "base".
        fm_form: form of naive flow matching, only of that objective.
        adapter: "lora" or "none".
        sampler: "ddim" or "flow".
        steps: sampling steps of each image.
        guidance_scale: scale of classifier-free guidance; 1 for none.
        evaluations: network evaluations of each image, of which guidance takes two for each step.
        allowed: number of evaluations at which the row is compared with others; guidance cannot use an odd last one.
        seconds_per_image: time for one image on this machine, generated in batches, with decoding.
        training_steps: training steps so far.
        learning_rate: learning rate of the training.
        names: which names the captions have, "trained" or "held out".
        largest_difference: largest difference of a pixel to the image of the base's own sampler, of 255.
    """

    section: Section
    network: str
    objective: str
    fm_form: str
    adapter: Literal["lora", "none"]
    sampler: Literal["ddim", "flow"]
    steps: int
    guidance_scale: float
    evaluations: int
    allowed: int
    seconds_per_image: float
    training_steps: int
    learning_rate: float
    names: Literal["trained", "held out"]
    largest_difference: float


def select(rows: Sequence[Row], section: Section, **entries: object) -> list[Row]:
    """Return the rows of one section that have all of these entries."""
    return [
        row
        for row in rows
        if row["section"] == section and all(row.get(key) == value for key, value in entries.items())
    ]


def best(rows: Sequence[Row]) -> Row:
    """Return the row with the smallest Fréchet distance."""
    return min(rows, key=lambda row: row["frechet_distance"])


def best_within(rows: Sequence[Row], network: str, evaluations: int) -> Row:
    """Return the best row of a network in the few-step comparison that takes at most so many evaluations."""
    return best([row for row in select(rows, "few_steps", network=network) if row["evaluations"] <= evaluations])


def excess(row: Row) -> float:
    """Return how far the Fréchet distance of a row is above that of real images."""
    return row["frechet_distance"] - row["frechet_floor"]


def verdict(a: Row, b: Row) -> Verdict:
    """Return whether the distance of `a` is "better" or "worse" than that of `b`, or "level": intervals overlap."""
    if a["frechet_high"] < b["frechet_low"]:
        return "better"
    return "worse" if a["frechet_low"] > b["frechet_high"] else "level"


def training_curve(rows: Sequence[Row], network: str) -> list[tuple[int, Row]]:
    """Return the (training steps, row) pairs of one network's training curve, in the order of training."""
    found = [(row["training_steps"], row) for row in select(rows, "continued", network=network)]
    return sorted(found, key=lambda pair: pair[0])
