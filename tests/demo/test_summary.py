"""The words follow the numbers, wins and losses alike."""

from typing import Any

import pytest

from d2f_fast.demo.reading import comparisons, reading, steps_to_reach, verdict


def row(objective: str, distance: float, half: float = 0.05, steps: int = 4, **entries: Any) -> dict[str, Any]:
    return {
        "measure": "quality",
        "objective": objective,
        "sampler": "flow",
        "spacing": "uniform",
        "steps": steps,
        "samples": 10,
        "frechet_distance": distance,
        "frechet_low": distance - half,
        "frechet_high": distance + half,
        "frechet_floor": 0.1,
        **entries,
    }


def rows_of(diff2flow: float, fm: float, diffusion: float, base: float, fm_paper: float = 2.0) -> list[dict[str, Any]]:
    distances = {"base": base, "diff2flow": diff2flow, "fm": fm, "fm_paper": fm_paper, "diffusion": diffusion}
    quality = [
        row(name, distance + extra, spacing=spacing)
        for name, distance in distances.items()
        for spacing, extra in (("uniform", 0.0), ("trailing", 0.01))
    ]
    training = [
        row(name, distances[name] + late, measure="training", training_steps=step, flow_loss=1.0 + late)
        for name in ("diff2flow", "fm", "fm_paper", "diffusion")
        for step, late in ((0, 9.0), (10, 1.0), (40, 0.0))
    ]
    grey = row(
        "base", 0.0, measure="grey_bias", captions="no colour", grey_bias=0.9, grey_bias_low=0.8, grey_bias_high=1
    )
    return [*quality, *training, grey]


def test_reading_follows_the_numbers_both_ways() -> None:
    won = rows_of(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    lost = rows_of(diff2flow=1.5, fm=0.3, diffusion=0.31, base=0.9)
    said = [reading([*rows, *comparisons(rows)], 4) for rows in (won, lost)]
    assert "beats the naive-flow LoRA (fm)" in said[0]
    assert "beats the naive-flow LoRA with the paper's sign (fm_paper)" in said[0]
    assert "cannot be told from the diffusion LoRA" in said[0]
    assert "7 times the excess over real pictures" in said[0]
    assert "first measured point of 10 steps" in said[0]
    assert "loses to the naive-flow LoRA (fm)" in said[1]
    assert "loses to the base, drawn along the flow without training," in said[1]
    assert "did not reach the final distance" in said[1]


def test_comparison_takes_the_best_sampler_of_each_network() -> None:
    rows = rows_of(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    rows.append(row("fm", 0.18, sampler="ddim", spacing="trailing"))
    against_fm = next(r for r in comparisons(rows) if r["measure"] == "comparison" and r["against"] == "fm")
    assert against_fm["against_sampler"] == "ddim"
    assert against_fm["verdict"] == "worse"
    assert against_fm["excess_ratio"] == pytest.approx(0.4)
    assert verdict(row("fm", 0.2), row("fm", 0.29)) == "level"
    assert steps_to_reach(rows, "diffusion", 1.31) == 10


def test_reading_names_the_other_judge_where_it_measured() -> None:
    rows = rows_of(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    rows += comparisons(rows)
    assert "ImageNet" not in reading(rows, 4)
    for r in rows:
        r |= {f"imagenet_{key}": 10 * value for key, value in r.items() if key.startswith("frechet")}
    said = reading(rows, 4)
    assert "the same pictures are at 3 (2.5 to 3.5) for diff2flow, 15 (14.5 to 15.5) for fm" in said
    assert "real ones at 1." in said
