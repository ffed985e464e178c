"""Test the selection and comparison of rows."""

from collections.abc import Callable
from typing import Any

import pytest

from d2f_fast.demo.rows import best, best_within, excess, select, training_curve, verdict

MakeRow = Callable[..., dict[str, Any]]


def test_best_setting_takes_no_more_evaluations_than_allowed(make_row: MakeRow) -> None:
    rows: Any = [
        make_row("few_steps", "base", 9.0, evaluations=1),
        make_row("few_steps", "base", 7.0, evaluations=2, guidance_scale=1.0),
        make_row("few_steps", "base", 8.0, evaluations=2, guidance_scale=2.0),
        make_row("few_steps", "base", 2.0, evaluations=25),
        make_row("few_steps", "reflow", 1.0, evaluations=1),
    ]
    assert [best_within(rows, "base", count) for count in (1, 2, 24, 25)] == [rows[0], rows[1], rows[1], rows[3]]
    assert best(rows) is rows[-1]
    assert select(rows, "few_steps", network="base", guidance_scale=2.0) == [rows[2]]


def test_rows_are_level_where_their_intervals_overlap(make_row: MakeRow) -> None:
    row: Any = make_row("style", "base", 5.0)
    others: Any = [make_row("style", "style", distance) for distance in (3.9, 4.1, 5.9, 6.1)]
    assert [verdict(other, row) for other in others] == ["better", "level", "level", "worse"]
    assert excess(row) == pytest.approx(4.0)


def test_training_curve_is_in_the_order_of_training(make_row: MakeRow) -> None:
    rows: Any = [make_row("continued", "fm", 1.0, training_steps=step) for step in (20, 0, 160)]
    assert [step for step, _ in training_curve(rows, "fm")] == [0, 20, 160]
