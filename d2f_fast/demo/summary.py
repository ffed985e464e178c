"""Put the demo's numbers into words; the same sentences serve wins and losses."""

from collections.abc import Sequence

from d2f_fast.demo.comparisons import best
from d2f_fast.demo.rows import Row, sampler_of, select, training_curve
from d2f_fast.evaluation.features import NAME

NAMES = {
    "base": "the untouched base",
    "diff2flow": "the aligned LoRA (diff2flow)",
    "fm": "the naive-flow LoRA (fm)",
    "fm_paper": "the naive-flow LoRA with the paper's sign (fm_paper)",
    "diffusion": "the diffusion LoRA",
}
VERBS = {"better": "beats", "worse": "loses to", "level": "cannot be distinguished from"}


def summary(rows: Sequence[Row], steps: int) -> list[str]:
    """Return one statement on each measurement.

    Args:
        rows: rows of the results, comparisons included.
        steps: number of network evaluations at which the networks are compared.
    """
    ours = best(rows, "diff2flow", steps)
    statements = [
        f"With {steps} network evaluations for each image and its best sampler, {NAMES['diff2flow']} has a Fréchet"
        f" distance (lower is better) of {_distance(ours)} to real images. Other real images have"
        f" {ours['frechet_floor']:.3g}.",
        *(_comparison(row) for row in select(rows, "comparison", steps=steps)),
        *(_training_steps(row) for row in select(rows, "steps_to_reach")),
        _imagenet(rows, steps),
        _loss(rows),
        *(
            statement
            for count in sorted({2, steps})
            if _was_measured(rows, count)
            for statement in _spacing(rows, count)
        ),
        _grey_bias(rows),
    ]
    return [statement for statement in statements if statement]


def _was_measured(rows: Sequence[Row], steps: int, objective: str = "base") -> bool:
    return bool(select(rows, "quality", steps=steps, objective=objective))


def _distance(row: Row) -> str:
    interval = f"{row['frechet_low']:.3g} to {row['frechet_high']:.3g}"
    return f"{row['frechet_distance']:.3g} ({interval}, {row['samples']} images, {sampler_of(row).label})"


def _comparison(row: Row) -> str:
    """Say which of two networks is better."""
    other: Row = {
        "measure": row["measure"],
        "sampler": row["against_sampler"],
        "spacing": row["against_spacing"],
    }
    sampler, name = sampler_of(other), NAMES[row["against"]]
    if row["against"] == "base" and sampler.name == "flow" and sampler.spacing == "uniform":
        name = "the base, sampled along the flow without training,"
    ratio = f", {row['excess_ratio']:.2g} times as far above real images" if row["excess_ratio"] else ""
    return f"It {VERBS[row['verdict']]} {name} with {sampler.label} ({row['against_frechet_distance']:.3g}{ratio})."


def _training_steps(row: Row) -> str:
    """Say how soon the aligned network reaches the final distance of another one."""
    other, budget = NAMES[row["against"]], row["budget"]
    if row["training_steps"] is None:
        return f"It did not reach the final distance of {other} within {budget} training steps."
    return (
        f"It reached the final distance of {other} ({row['frechet_distance']:.3g}, after {budget} training steps) by"
        f" step {row['training_steps']}, the first measured point at or below it."
    )


def _imagenet(rows: Sequence[Row], steps: int) -> str:
    """Give the distances of the same images in the ImageNet features; empty if the packages are not installed."""
    order = ("diff2flow", "fm", "fm_paper", "diffusion", "base")
    chosen = {name: best(rows, name, steps) for name in order if _was_measured(rows, steps, name)}
    if "imagenet_frechet_distance" not in chosen["diff2flow"]:
        return ""
    parts = [f"{row['imagenet_frechet_distance']:.3g} for {name}" for name, row in chosen.items()]
    return (
        f"In the features of a network trained on ImageNet ({NAME}) the same images have distances of"
        f" {', '.join(parts)}, and real images have {chosen['diff2flow']['imagenet_frechet_floor']:.3g}."
    )


def _loss(rows: Sequence[Row]) -> str:
    """Give the loss before and after training."""
    parts = []
    for objective in ("diff2flow", "fm", "fm_paper", "diffusion"):
        curve = training_curve(rows, objective)
        parts.append(f"{curve[0][1]['flow_loss']:.3g} to {curve[-1][1]['flow_loss']:.3g} for {objective}")
    return f"The flow loss on held-out images went from {', '.join(parts)}."


def _spacing(rows: Sequence[Row], steps: int) -> list[str]:
    """Say how much of the difference between networks is the node spacing, and how much is training."""
    parts = []
    for objective in ("diff2flow", "diffusion"):
        uniform, trailing = (
            select(rows, "quality", objective=objective, sampler="flow", spacing=spacing, steps=steps)[0]
            for spacing in ("uniform", "trailing")
        )
        parts.append((uniform["frechet_distance"], trailing["frechet_distance"]))
    (ours_uniform, ours_trailing), (theirs_uniform, theirs_trailing) = parts
    return [
        f"At {steps} evaluations, trailing nodes in place of uniform ones change the distance of diff2flow from"
        f" {ours_uniform:.3g} to {ours_trailing:.3g}, and that of diffusion from {theirs_uniform:.3g} to"
        f" {theirs_trailing:.3g}.",
        f"At {steps} evaluations on equal nodes, the distance of diff2flow minus that of diffusion is"
        f" {ours_uniform - theirs_uniform:+.3g} (uniform) and {ours_trailing - theirs_trailing:+.3g} (trailing). Below"
        " 0, diff2flow is better.",
    ]


def _grey_bias(rows: Sequence[Row]) -> str:
    """Give the spread of brightness of each network and sampler."""
    found = [
        (row["grey_bias"], f"{row['objective']} with {sampler_of(row).label}")
        for row in select(rows, "grey_bias", captions="no colour")
    ]
    (least, lowest), (most, highest) = min(found), max(found)
    return (
        "For captions without a colour, images have a spread of brightness of"
        f" {least:.2f} ({lowest}) to {most:.2f} ({highest}) times that of real images; 1 is best."
    )
