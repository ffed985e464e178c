"""Compare the aligned network with the others: each network at its best, and by training steps."""

from collections.abc import Sequence

from d2f_fast.demo.rows import Row, Verdict, select, training_curve


def best(rows: Sequence[Row], objective: str, steps: int) -> Row:
    """Return the row of a network's best sampler, the one with the smallest distance, at some network evaluations."""
    found = select(rows, "quality", objective=objective, steps=steps)
    return min(found, key=lambda row: row["frechet_distance"])


def excess(row: Row) -> float:
    """Return how far the Fréchet distance of a row is above that of real images."""
    return row["frechet_distance"] - row["frechet_floor"]


def verdict(a: Row, b: Row) -> Verdict:
    """Return whether the distance of `a` is "better" or "worse" than that of `b`, or "level": intervals overlap."""
    if a["frechet_high"] < b["frechet_low"]:
        return "better"
    return "worse" if a["frechet_low"] > b["frechet_high"] else "level"


def steps_to_reach(rows: Sequence[Row], objective: str, distance: float) -> int | None:
    """Return the first measured training step whose distance is at most `distance`, or None if there is none."""
    curve = training_curve(rows, objective)
    return next((step for step, row in curve if row["frechet_distance"] <= distance), None)


def comparisons(rows: Sequence[Row]) -> list[Row]:
    """Return the rows "comparison" and "steps_to_reach" that follow from the measured rows.

    At each number of network evaluations the aligned network with its best sampler is compared with every other
    network with its best sampler, and with the base sampled along the flow. Its training steps are compared with those
    of the naive-flow networks.
    """
    found: list[Row] = []
    for steps in sorted({row["steps"] for row in select(rows, "quality")}):
        ours = best(rows, "diff2flow", steps)
        rivals = [
            name
            for name in ("fm", "fm_paper", "diffusion", "base")
            if select(rows, "quality", objective=name, steps=steps)
        ]
        others = [best(rows, objective, steps) for objective in rivals]
        without_training = select(rows, "quality", objective="base", sampler="flow", spacing="uniform", steps=steps)
        others += [row for row in without_training if row is not others[-1]]
        found += [_comparison(ours, other) for other in others]
    return found + [_steps_to_reach(rows, naive) for naive in ("fm", "fm_paper")]


def _comparison(ours: Row, other: Row) -> Row:
    """Return the row that compares two rows."""
    return {
        "measure": "comparison",
        "objective": "diff2flow",
        "adapter": "lora",
        "sampler": ours["sampler"],
        "spacing": ours["spacing"],
        "steps": ours["steps"],
        "samples": ours["samples"],
        "frechet_distance": ours["frechet_distance"],
        "against": other["objective"],
        "against_sampler": other["sampler"],
        "against_spacing": other["spacing"],
        "against_frechet_distance": other["frechet_distance"],
        "excess_ratio": excess(other) / excess(ours) if min(excess(ours), excess(other)) > 0 else None,
        "verdict": verdict(ours, other),
    }


def _steps_to_reach(rows: Sequence[Row], naive: str) -> Row:
    """Return the row that says when the aligned network reaches the final distance of a naive-flow network."""
    budget, final = training_curve(rows, naive)[-1]
    return {
        "measure": "steps_to_reach",
        "objective": "diff2flow",
        "adapter": "lora",
        "steps": final["steps"],
        "samples": final["samples"],
        "frechet_distance": final["frechet_distance"],
        "against": naive,
        "training_steps": steps_to_reach(rows, "diff2flow", final["frechet_distance"]),
        "budget": budget,
    }
