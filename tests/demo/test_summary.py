"""Test that the sentences follow the numbers, for wins and losses alike."""

from collections.abc import Callable
from typing import Any

from d2f_fast.demo.comparisons import comparisons
from d2f_fast.demo.summary import summary

Rows = list[dict[str, Any]]


def test_summary_reports_wins_and_losses(make_rows: Callable[..., Rows]) -> None:
    won = make_rows(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    lost = make_rows(diff2flow=1.5, fm=0.3, diffusion=0.31, base=0.9)
    texts = [" ".join(summary([*rows, *comparisons(rows)], 4)) for rows in (won, lost)]
    assert "beats the naive-flow LoRA (fm)" in texts[0]
    assert "beats the naive-flow LoRA with the paper's sign (fm_paper)" in texts[0]
    assert "cannot be distinguished from the diffusion LoRA" in texts[0]
    assert "7 times as far above real images" in texts[0]
    assert "by step 10, the first measured point" in texts[0]
    assert "loses to the naive-flow LoRA (fm)" in texts[1]
    assert "loses to the base, sampled along the flow without training," in texts[1]
    assert "did not reach the final distance" in texts[1]


def test_each_statement_is_short_and_says_which_direction_is_better(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    statements = summary([*rows, *comparisons(rows)], 4)
    assert len(statements) >= 8
    assert max(len(statement.split()) for statement in statements) <= 50
    assert "Fréchet distance (lower is better)" in statements[0]


def test_summary_gives_imagenet_distances_only_if_they_were_measured(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    rows += comparisons(rows)
    assert "ImageNet" not in " ".join(summary(rows, 4))
    for row in rows:
        row |= {f"imagenet_{key}": 10 * value for key, value in row.items() if key.startswith("frechet")}
    text = " ".join(summary(rows, 4))
    assert "the same images have distances of 3 for diff2flow, 15 for fm" in text
    assert "real images have 1." in text
