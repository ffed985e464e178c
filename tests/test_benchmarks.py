"""The rows that benchmarks write: a known duration comes out, and tables with other columns are not spoilt."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = """
import time
import torch

def test_sleep(measure):
    measure(lambda x: time.sleep(0.002), lambda: (torch.ones(1),), case="2 ms", provider="clock", bytes_moved=4000)
"""


def run(folder):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_row_holds_the_time_of_one_call_and_is_appended(tmp_path):
    for name in ("conftest.py", "pyproject.toml", "benchmarks/clock.py", "benchmarks/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "benchmarks/bench_sleep.py").write_text(BENCHMARK)
    for rows in (1, 2):
        done = run(tmp_path)
        assert done.returncode == 0, done.stdout
        (table,) = (tmp_path / "benchmarks/results").glob("*.csv")
        with table.open() as file:
            found = list(csv.DictReader(file))
        assert len(found) == rows
    row = found[-1]
    assert (row["benchmark"], row["case"], row["provider"], row["timing"]) == ("sleep", "2 ms", "clock", "launched")
    p20, median, p80 = (float(row[name]) for name in ("p20_us", "median_us", "p80_us"))
    assert 2000 <= p20 <= median <= p80
    assert abs(float(row["gb_per_s"]) - 4000 / median / 1e3) <= 1e-3 * float(row["gb_per_s"])
    assert "2 ms" in done.stdout and "Median" in done.stdout

    before = "another,table\n"
    table.write_text(before)
    done = run(tmp_path)
    assert done.returncode == 1 and "has other columns than this version writes: move it away" in done.stdout
    assert table.read_text() == before
