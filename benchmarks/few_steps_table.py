"""Print tables of the features that `few_steps` kept, with 95 % intervals over all seeds in the folder.

    python -m benchmarks.few_steps_table few_steps

A distance is the Fréchet distance to the reference minus the floor, which is that of as many real images; the mean over
the seeds is shown. A bootstrap resamples the captions, alike for every setting, and the reference. Its mean is moved to
the measured value, because resampling shifts every Fréchet distance upwards. The floor is not resampled.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d2f_fast.evaluation.distances import Array, bootstrap_deviations, frechet_distance, real_floor
from d2f_fast.evaluation.neighbours import Neighbourhoods, compare_neighbourhoods


class Run(NamedTuple):
    """What was measured of one network with one setting and one seed.

    Attributes:
        above: distance above the floor.
        resampled: the same for each resampling, around `above`.
        right_names: fraction of the images whose name the classifier guesses first.
        neighbours: precision, recall and coverage, of the real images of the same captions.
    """

    above: float
    resampled: Array
    right_names: float
    neighbours: Neighbourhoods


class Row(NamedTuple):
    """The runs of one setting, by their seeds."""

    network: str
    setting: str
    evaluations: int
    runs: dict[int, Run]

    def mean(self, value: Callable[[Run], float]) -> float:
        """Return the mean of a number of each run over the seeds."""
        return float(np.mean([value(run) for run in self.runs.values()]))

    def above(self, seeds: Iterable[int]) -> tuple[float, Array]:
        """Return the mean over seeds of the distance above the floor, and the same of each resampling."""
        runs = [self.runs[seed] for seed in seeds]
        return float(np.mean([run.above for run in runs])), np.asarray(np.mean([run.resampled for run in runs], 0))


def measure(generated: Array, real: Array, reference: Array, right: NDArray[np.bool_], seed: int, repeats: int) -> Run:
    """Measure the features of the images of one setting.

    Args:
        generated: features [n, d] of the generated images.
        real: features [n, d] of the real images of the same captions.
        reference: features [m, d] of other real images.
        right: whether the classifier guessed the name of each image, [n].
        seed: seed of the bootstrap and the floor. Equal seeds resample alike.
        repeats: number of resamplings.
    """
    floor = real_floor(np.concatenate([real, reference]), len(generated), len(reference), seed=seed)
    above = frechet_distance(generated, reference) - floor
    deviations = bootstrap_deviations(frechet_distance, generated, reference, repeats=repeats, seed=seed)
    return Run(above, above + deviations, float(right.mean()), compare_neighbourhoods(real, generated))


def best(rows: Sequence[Row], least: int, most: int, seeds: Set[int]) -> Row | None:
    """Return the row of the base with the smallest distance, or None.

    Args:
        rows: rows of all networks.
        least: smallest number of network evaluations.
        most: largest number of them.
        seeds: seeds that the distance is the mean of; rows without one of them are left out.
    """
    found = [
        row for row in rows if row.network == "base" and least <= row.evaluations <= most and seeds <= set(row.runs)
    ]
    return min(found, key=lambda row: row.above(seeds)[0], default=None)


def interval(value: float, resampled: Array) -> str:
    """Return a number with its 95 % interval as text."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def ratio(one: Row, other: Row) -> str:
    """Return the ratio of the distances above the floor of two rows, over the seeds of the first."""
    (above, resampled), (below, resampled_below) = one.above(one.runs), other.above(one.runs)
    return interval(above / below, resampled / resampled_below)


def read(folder: Path, repeats: int) -> dict[str, list[Row]]:
    """Return the rows of each kind of captions in a folder."""
    runs: dict[tuple[str, str, str, int], dict[int, Run]] = {}
    for path in sorted(folder.glob("*.npz")):
        if path.stem.startswith("real, "):
            continue
        with np.load(path) as kept:
            seed = int(kept["seed"])
            key = (str(kept["captions"]), str(kept["network"]), str(kept["setting"]), int(kept["evaluations"]))
            with np.load(folder / f"real, {len(kept['features'])} images, seed {seed}.npz") as real:
                run = measure(kept["features"], real["features"], real["reference"], kept["right_names"], seed, repeats)
        runs.setdefault(key, {})[seed] = run
    tables: dict[str, list[Row]] = {}
    for (captions, network, setting, evaluations), of_seeds in runs.items():
        tables.setdefault(captions, []).append(Row(network, setting, evaluations, of_seeds))
    return tables


def print_table(rows: Sequence[Row]) -> None:
    """Print one line for each row, and the ratios of the LoRAs' distances to the base's best ones."""
    print("| network | evaluations | setting | seeds | above the floor | recall | coverage | right name |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row.network, row.evaluations, row.setting)):
        recall, coverage = row.mean(lambda run: run.neighbours.recall), row.mean(lambda run: run.neighbours.coverage)
        right, seeds = row.mean(lambda run: run.right_names), ", ".join(map(str, sorted(row.runs)))
        print(
            f"| {row.network} | {row.evaluations} | {row.setting} | {seeds} |"
            f" {interval(*row.above(row.runs))} | {recall:.3f} | {coverage:.3f} | {right:.1%} |"
        )
    print()
    for row in rows:
        if row.network == "base":
            continue
        for text, least, most in (("at 1 or 2 evaluations", 1, 2), ("at more evaluations", 3, 1000)):
            other = best(rows, least, most, set(row.runs))
            if other is not None:
                name = f"{row.network}, {row.evaluations} evaluations, seeds {', '.join(map(str, sorted(row.runs)))}"
                print(f"- {name}: {ratio(row, other)} times the base's best {text} ({other.setting})")


def main() -> None:
    """Print the tables of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --output of few_steps")
    parser.add_argument("--repeats", type=int, default=200, help="resamplings behind the intervals (%(default)s)")
    options = parser.parse_args()
    for captions, rows in read(options.folder, options.repeats).items():
        print(f"\n{captions.capitalize()}\n")
        print_table(rows)


if __name__ == "__main__":
    main()
