"""What the demo's numbers say, in words: written from the rows, wins and losses alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from d2f_fast.demo.sampling import Route
from d2f_fast.evaluation.features import NAME

Row = Mapping[str, Any]

NAMES = {
    "base": "the untouched base",
    "diff2flow": "the aligned LoRA (diff2flow)",
    "fm": "the naive-flow LoRA (fm)",
    "fm_paper": "the naive-flow LoRA with the paper's sign (fm_paper)",
    "diffusion": "the diffusion LoRA",
}


def route_of(row: Row) -> Route:
    """Sampler and spacing of a row."""
    return Route(row["sampler"], row["spacing"])


def select(rows: Sequence[Row], measure: str, **entries: Any) -> list[Row]:
    """Rows of one measure with these entries."""
    return [
        row
        for row in rows
        if row["measure"] == measure and all(row.get(key) == value for key, value in entries.items())
    ]


def best(rows: Sequence[Row], objective: str, steps: int) -> Row:
    """Row of the sampler with the smallest distance."""
    found = select(rows, "quality", objective=objective, steps=steps)
    return min(found, key=lambda row: row["frechet_distance"])


def excess(row: Row) -> float:
    """Fréchet distance above that of real pictures."""
    return row["frechet_distance"] - row["frechet_floor"]


def verdict(a: Row, b: Row) -> str:
    """Whether `a` is "better" or "worse" than `b`, or "level": their intervals overlap."""
    if a["frechet_high"] < b["frechet_low"]:
        return "better"
    return "worse" if a["frechet_low"] > b["frechet_high"] else "level"


def steps_to_reach(rows: Sequence[Row], objective: str, distance: float) -> int | None:
    """First measured training step at which the distance is no larger than this one."""
    curve = sorted(select(rows, "training", objective=objective), key=lambda row: row["training_steps"])
    return next((row["training_steps"] for row in curve if row["frechet_distance"] <= distance), None)


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows that set best against best at each number of evaluations, and training steps against training steps."""
    found: list[dict[str, Any]] = []
    for steps in sorted({row["steps"] for row in select(rows, "quality")}):
        ours = best(rows, "diff2flow", steps)
        rivals = [name for name in ("fm", "fm_paper", "diffusion", "base") if _has(rows, steps, name)]
        others = [best(rows, objective, steps) for objective in rivals]
        training_free = select(rows, "quality", objective="base", sampler="flow", spacing="uniform", steps=steps)
        others += [row for row in training_free if row is not others[-1]]
        for other in others:
            ratio = excess(other) / excess(ours) if min(excess(ours), excess(other)) > 0 else None
            found.append(
                {
                    "measure": "comparison",
                    "objective": "diff2flow",
                    "adapter": "lora",
                    "sampler": ours["sampler"],
                    "spacing": ours["spacing"],
                    "steps": steps,
                    "samples": ours["samples"],
                    "frechet_distance": ours["frechet_distance"],
                    "against": other["objective"],
                    "against_sampler": other["sampler"],
                    "against_spacing": other["spacing"],
                    "against_frechet_distance": other["frechet_distance"],
                    "excess_ratio": ratio,
                    "verdict": verdict(ours, other),
                }
            )
    for naive in ("fm", "fm_paper"):
        final = max(select(rows, "training", objective=naive), key=lambda row: row["training_steps"])
        found.append(
            {
                "measure": "steps_to_reach",
                "objective": "diff2flow",
                "adapter": "lora",
                "steps": final["steps"],
                "samples": final["samples"],
                "frechet_distance": final["frechet_distance"],
                "against": naive,
                "training_steps": steps_to_reach(rows, "diff2flow", final["frechet_distance"]),
                "budget": final["training_steps"],
            }
        )
    return found


def reading(rows: Sequence[Row], steps: int) -> str:
    """One paragraph on the figures at one number of evaluations, and what surrounds them."""
    ours = best(rows, "diff2flow", steps)
    said = [
        f"At {steps} evaluations and best with best, {NAMES['diff2flow']} is at a Fréchet distance of"
        f" {_distance(ours)}; real pictures are at {ours['frechet_floor']:.3g} from each other."
    ]
    for row in select(rows, "comparison", steps=steps):
        other = {
            "sampler": row["against_sampler"],
            "spacing": row["against_spacing"],
        }
        free = row["against"] == "base" and other["sampler"] == "flow" and other["spacing"] == "uniform"
        name = "the base, drawn along the flow without training," if free else NAMES[row["against"]]
        words = {"better": "beats", "worse": "loses to", "level": "cannot be told from"}[row["verdict"]]
        ratio = f", {row['excess_ratio']:.2g} times the excess over real pictures" if row["excess_ratio"] else ""
        said.append(f"It {words} {name} with {route_of(other).label} ({row['against_frechet_distance']:.3g}{ratio}).")
    for reach in select(rows, "steps_to_reach"):
        naive, budget = NAMES[reach["against"]], reach["budget"]
        if reach["training_steps"] is None:
            said.append(f"It did not reach the final distance of {naive} within {budget} training steps.")
        else:
            said.append(
                f"It was at the final distance of {naive} ({reach['frechet_distance']:.3g}, after {budget} training"
                f" steps) at the first measured point of {reach['training_steps']} steps."
            )
    said += [
        _imagenet(rows, steps),
        _loss(rows),
        *(_spacing(rows, count) for count in sorted({2, steps}) if _has(rows, count)),
        _grey(rows),
    ]
    return " ".join(sentence for sentence in said if sentence)


def _has(rows: Sequence[Row], steps: int, objective: str = "base") -> bool:
    return bool(select(rows, "quality", steps=steps, objective=objective))


def _distance(row: Row) -> str:
    interval = f"{row['frechet_low']:.3g} to {row['frechet_high']:.3g}"
    return f"{row['frechet_distance']:.3g} ({interval}, {row['samples']} pictures, {route_of(row).label})"


def _imagenet(rows: Sequence[Row], steps: int) -> str:
    """The same pictures in the features of another judge, where it is installed."""
    order = ("diff2flow", "fm", "fm_paper", "diffusion", "base")
    chosen = {name: best(rows, name, steps) for name in order if _has(rows, steps, name)}
    if "imagenet_frechet_distance" not in chosen["diff2flow"]:
        return ""
    parts = [
        f"{row['imagenet_frechet_distance']:.3g} ({row['imagenet_frechet_low']:.3g} to"
        f" {row['imagenet_frechet_high']:.3g}) for {name}"
        for name, row in chosen.items()
    ]
    return (
        f"In the features of a network trained on ImageNet ({NAME}) the same pictures are at {', '.join(parts)}, real"
        f" ones at {chosen['diff2flow']['imagenet_frechet_floor']:.3g}."
    )


def _loss(rows: Sequence[Row]) -> str:
    """Loss before and after training."""
    parts = []
    for objective in ("diff2flow", "fm", "fm_paper", "diffusion"):
        curve = sorted(select(rows, "training", objective=objective), key=lambda row: row["training_steps"])
        parts.append(f"{curve[0]['flow_loss']:.3g} to {curve[-1]['flow_loss']:.3g} for {objective}")
    return f"The flow loss on held-out pictures went from {', '.join(parts)}."


def _spacing(rows: Sequence[Row], steps: int) -> str:
    """How much of the distance between networks is the node spacing, and how much is training."""
    parts = []
    for objective in ("diff2flow", "diffusion"):
        uniform, trailing = (
            select(rows, "quality", objective=objective, sampler="flow", spacing=spacing, steps=steps)[0]
            for spacing in ("uniform", "trailing")
        )
        parts.append((uniform["frechet_distance"], trailing["frechet_distance"]))
    (ours_uniform, ours_trailing), (theirs_uniform, theirs_trailing) = parts
    return (
        f"Node spacing alone, from uniform to trailing at {steps} evaluations, moves diff2flow from {ours_uniform:.3g}"
        f" to {ours_trailing:.3g} and diffusion from {theirs_uniform:.3g} to {theirs_trailing:.3g}; on equal nodes they"
        f" differ by {ours_uniform - theirs_uniform:+.3g} (uniform) and {ours_trailing - theirs_trailing:+.3g}"
        " (trailing; below 0 diff2flow is the better one)."
    )


def _grey(rows: Sequence[Row]) -> str:
    """Brightness spread, route by route."""
    parts = [
        f"{row['objective']} by {route_of(row).label} {row['grey_bias']:.2f}"
        f" ({row['grey_bias_low']:.2f} to {row['grey_bias_high']:.2f})"
        for row in select(rows, "grey_bias", captions="no colour")
    ]
    return f"Brightness spread for captions without a colour, 1 being the real pictures': {', '.join(parts)}."
