"""Test the comparison of networks."""

from collections.abc import Callable
from typing import Any

import pytest

from d2f_fast.demo.comparisons import comparisons, steps_to_reach, verdict


def test_comparison_takes_the_best_sampler_of_each_network(
    make_row: Callable[..., dict[str, Any]], make_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = make_rows(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    rows.append(make_row("fm", 0.18, sampler="ddim", spacing="trailing"))
    against_fm = next(r for r in comparisons(rows) if r["measure"] == "comparison" and r["against"] == "fm")
    assert against_fm["against_sampler"] == "ddim"
    assert against_fm["verdict"] == "worse"
    assert against_fm["excess_ratio"] == pytest.approx(0.4)
    assert verdict(make_row("fm", 0.2), make_row("fm", 0.29)) == "level"
    assert steps_to_reach(rows, "diffusion", 1.31) == 10
