"""Tests of the rows that benchmarks write, their tables and charts, and of the run on a GPU, on a CPU."""

import argparse
import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from triton import knobs

from benchmarks import depth_table, expected_times, few_steps_table, kept_rows, resolution_table, source_table
from benchmarks.bench_train_step import ROWS
from benchmarks.compile_ahead import Ahead, Launch
from benchmarks.train_steps import EVALUATED_AT_ONCE, MAX_NORM, Levers, PeftStep
from benchmarks.unets import Case
from d2f_fast.commands.main import parse
from d2f_fast.kernels.lora_dispatch import Tile

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = """
import time
import torch

def test_sleep(measure):
    measure(lambda x: time.sleep(0.002), lambda: (torch.ones(1),), case="2 ms", provider="clock", bytes_moved=4000)
"""


def run(folder, *options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the files that measure, and no benchmark."""
    for name in ("conftest.py", "pyproject.toml", "benchmarks/clock.py", "benchmarks/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()  # pytest warns of a folder of its settings that is missing.
    return tmp_path


THREE_RUNS = """
from pathlib import Path
import pytest

for number in range(3):
    if number == 2:
        table.write_text("another,table\\n")
    print("exit code", int(pytest.main(["-p", "no:cacheprovider", "--benchmark"])), "of a run", flush=True)
    (table,) = Path("benchmarks/results").glob("*.csv")
    Path(f"{number}.csv").write_text(table.read_text())
"""


def test_row_holds_the_time_of_one_call_and_is_appended(checkout):
    (checkout / "benchmarks/bench_sleep.py").write_text(BENCHMARK)
    # One process imports torch once for all three runs.
    done = subprocess.run([sys.executable, "-c", THREE_RUNS], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third, _ = done.stdout.split(" of a run\n")
    assert first.endswith("exit code 0") and second.endswith("exit code 0"), done.stdout
    for number, rows in enumerate((1, 2)):
        with (checkout / f"{number}.csv").open() as file:
            found = list(csv.DictReader(file))
        assert len(found) == rows
    row = found[-1]
    assert (row["benchmark"], row["case"], row["provider"], row["timing"]) == ("sleep", "2 ms", "clock", "launched")
    p20, median, p80 = (float(row[name]) for name in ("p20_us", "median_us", "p80_us"))
    assert 2000 <= p20 <= median <= p80
    assert abs(float(row["gb_per_s"]) - 4000 / median / 1e3) <= 1e-3 * float(row["gb_per_s"])
    assert "2 ms" in second and "Median" in second

    assert third.endswith("exit code 1") and "has other columns than this version writes: move it away" in third
    assert (checkout / "2.csv").read_text() == "another,table\n"


@pytest.mark.slow
def test_go_on_runs_only_the_benchmarks_that_are_missing(checkout):
    fails = "\n\ndef test_fails():\n    assert False\n"
    (checkout / "benchmarks/bench_sleep.py").write_text(BENCHMARK + fails)
    first, second = (run(checkout, "--go_on", "--results", "rows") for _ in range(2))
    assert "1 failed, 1 passed" in first.stdout, first.stdout
    assert "1 failed, 1 deselected" in second.stdout
    assert len((checkout / "rows/measured.txt").read_text().splitlines()) == 1
    (checkout / "benchmarks/bench_sleep.py").write_text(BENCHMARK)
    for chosen in ([], ["-k", "sleep"]):
        third = run(checkout, "--go_on", "--results", "rows", *chosen)
        assert third.returncode == 0 and "1 deselected" in third.stdout


TWO_RUNS = """
import pytest

for number in range(2):
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.kept_tests", "--results", "rows", "--dry_run", "-n", "0"]
    print("exit code", int(pytest.main(options)), "of a run", flush=True)
"""


def test_tests_that_passed_are_rows_and_do_not_run_again(checkout):
    (checkout / "tests/test_two.py").write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert False\n")
    shutil.copy(ROOT / "benchmarks/kept_tests.py", checkout / "benchmarks")
    done = subprocess.run([sys.executable, "-c", TWO_RUNS], cwd=checkout, capture_output=True, text=True)
    assert done.stdout.count("exit code 1 of a run") == 2, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout and "1 failed, 1 deselected" in done.stdout
    (table,) = (checkout / "rows").glob("dry-run-on-*-tests.csv")
    with table.open() as file:
        rows = [(row["test"].partition("::")[2], row["outcome"]) for row in csv.DictReader(file)]
    assert rows == [("test_good", "passed"), ("test_bad", "failed"), ("test_bad", "failed")]


# Tables and charts


TABLE = """date,commit,device,torch,triton,threads,clock_mhz,case,provider,median_ms,p20_ms,p80_ms
1,a,CPU,2,3,2,,small,script,80,70,90
1,a,CPU,2,3,2,,small,d2f_fast,99,98,100
2,b,CPU,2,3,2,,small,d2f_fast,40,30,50
2,b,CPU,2,3,2,,large <b>,script,800,700,900
"""


def test_report_shows_the_newest_row_of_each_provider(tmp_path):
    (tmp_path / "cpu-some-step.csv").write_text(TABLE)
    (tmp_path / "cpu-lora-tuning.csv").write_text("date,op,us\n1,shrink,3\n")
    command = [sys.executable, "-m", "benchmarks.report", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "40" in printed and "99" not in printed and "shrink" not in printed
    (path,) = tmp_path.glob("*.svg")
    chart = path.read_text()
    script, ours, large = (float(w) for w in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', chart))
    assert ours == pytest.approx(script / 2, abs=0.2) and large > 0
    assert path.name == "cpu-some-step.svg" and "large &lt;b&gt;" in chart and "<b>" not in chart


def test_report_charts_each_number_of_steps_of_a_sampler(tmp_path):
    shown = (
        "case,steps,provider,picture_ms,fastest_ms,slowest_ms,vs_diffusers,load_s,file_mb,peak_mib,largest_difference"
    )
    rows = [f"date,commit,device,torch,triton,threads,{shown}"]
    forms = [(steps, provider) for provider in ("diffusers", "onnx_loop") for steps in (1, 4)]
    rows += [f"1,a,CPU,2,3,2,small,{n},{provider},{10 * n},{9 * n},{12 * n},1,1,1,1,0" for n, provider in forms]
    (tmp_path / "cpu-sampling.csv").write_text("\n".join(rows) + "\n")
    command = [sys.executable, "-m", "benchmarks.report", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    chart = (tmp_path / "cpu-sampling.svg").read_text()
    assert chart.count("<rect") == 4 and "small 4 steps, ms" in chart and "fastest to slowest" in chart


# A quarter of an hour on a GPU

PARTS = ["tests", "tuning", "kernels", "steps", "sdxl", "batch-1"]


def quarter(folder, *parts, seconds=600, **environment):
    """Run parts of a dry run, and return the finished process and the seconds that it took."""
    # The script runs the first `python` that it finds.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    dry_run = {"D2F_SUITE_DRY_RUN": "1", "D2F_SUITE_SECONDS": str(seconds)}
    environment = {**os.environ, "PATH": path, **dry_run, **environment}
    started = time.monotonic()
    command = ["bash", str(ROOT / "benchmarks/gpu_quarter.sh"), str(folder), *parts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done, time.monotonic() - started


STUB = """#!/bin/bash
case "$*" in
  *benchmarks.report*) cat "$3"/*.csv ;;
  *xdist*) exit 1 ;;
  *) echo "row of $*" >> "{folder}/results/a.csv"; {then} ;;
esac
"""


def stub(tmp_path, then):
    """Put a `python` before the real one on the path that writes a row and then runs `then`."""
    (tmp_path / "bin").mkdir(parents=True)
    script = tmp_path / "bin/python"
    script.write_text(STUB.format(folder=tmp_path / "out", then=then))
    script.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def rows_of(folder):
    return (folder / "results/a.csv").read_text().splitlines()


def test_stopped_part_keeps_its_rows_and_prints_them_last(tmp_path):
    def stop(part):
        # bash counts whole seconds, of which the first one may be nearly over when the part starts.
        return quarter(tmp_path / part / "out", part, seconds=3, **stub(tmp_path / part, "sleep 300"))

    with ThreadPoolExecutor(len(PARTS)) as pool:
        stopped = dict(zip(PARTS, pool.map(stop, PARTS), strict=True))
    for part, (done, took) in stopped.items():
        out = tmp_path / part / "out"
        assert done.returncode == 124 and took < 300, (part, done.stderr)
        rows = (out / "results/a.csv").read_text()
        assert rows.startswith("row of") and done.stdout.endswith(rows), part
        assert (out / "summary.txt").read_text() == rows, part
        assert not list((out / "state").iterdir()), part  # the limit of the whole run is not that of the part


def test_parts_run_in_order_and_go_on_where_they_stopped(tmp_path):
    environment = stub(tmp_path, "[[ $* != *tune_lora* ]]")
    out = tmp_path / "out"
    done, _ = quarter(out, **environment)
    assert done.returncode == 1 and "--- tuning: failed (1)" in done.stdout
    starts = ["fill_cache", "-m gpu", "tune_lora", "probe", "bench_align", "bench_lora_linear", "[b16_first"]
    starts += ["[sdxl_first and eager", "test_memory_cap", "[sdxl_first and blocks", "[b1_first"]
    rows = rows_of(out)
    assert len(rows) == len(starts) and sorted(rows[:2]) == sorted(rows[:2], key=lambda row: "-m gpu" in row)
    assert all(start in row for start, row in zip(starts[2:], rows[2:], strict=True)), rows
    # A part that its own limit has cut waits for those that are new, and one that is done does not run again.
    (out / "state/steps").write_text("cut")
    (out / "state/batch-1").unlink()
    done, _ = quarter(out, **environment)
    assert [next(start for start in starts if start in row) for row in rows_of(out)[len(rows) :]] == [
        "[b1_first",
        "tune_lora",
        "[b16_first",
    ]


def test_complete_folder_is_only_reported_again(tmp_path):
    environment = stub(tmp_path, "true")
    for _ in range(2):
        done, _ = quarter(tmp_path / "out", **environment)
        assert done.returncode == 0 and len(rows_of(tmp_path / "out")) == 11
    assert "---" not in done.stdout and done.stdout.splitlines() == rows_of(tmp_path / "out")


def test_signal_ends_the_commands_and_keeps_the_rows(tmp_path):
    environment = {**os.environ, "D2F_SUITE_DRY_RUN": "1", **stub(tmp_path, "exec sleep 300")}
    command = ["bash", str(ROOT / "benchmarks/gpu_quarter.sh"), str(tmp_path / "out"), "tests"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out/results/a.csv").exists() or len(rows_of(tmp_path / "out")) < 2:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    left = subprocess.run(["pgrep", "-f", f"{tmp_path}"], capture_output=True, text=True).stdout
    assert left == "" and len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize("arguments", [[], ["out", "everything"]])
def test_wrong_arguments_of_the_quarter_are_refused(tmp_path, arguments):
    command = ["bash", str(ROOT / "benchmarks/gpu_quarter.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    usage = "usage: bash benchmarks/gpu_quarter.sh FOLDER [tests|tuning|kernels|steps|sdxl|batch-1]...\n"
    assert (done.returncode, done.stderr) == (2, usage) and not list(tmp_path.iterdir())


def test_quarter_selects_each_of_its_rows_once():
    text = (ROOT / "benchmarks/gpu_quarter.sh").read_text()
    chosen = re.findall(r"bench_train_step.py -k '([^']+)", text)
    alternatives = [part.split(" and ") for parts in chosen for part in parts.split(" or ")]
    names = [f"test_train_step[{row.id}]" for row in ROWS if "_first-" in row.id]
    names += ["test_memory_cap[b1]", "test_memory_cap[sdxl]"]
    assert len(names) == 14
    counts = {name: sum(all(word in name for word in words) for words in alternatives) for name in names}
    assert set(counts.values()) == {1}, counts
    others = [f"test_train_step[{row.id}]" for row in ROWS if "_first-" not in row.id]
    assert not [name for name in others if any(all(word in name for word in words) for words in alternatives)]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tests", "tuning", "kernels", "batch-1"])
def test_dry_run_of_a_part_leaves_rows_marked_dry_and_measures_none_twice(tmp_path, part):
    measured = []
    for _ in range(2):
        done, _ = quarter(tmp_path, part, seconds=500)
        assert done.returncode in (0, 124), done.stdout
        tables = sorted((tmp_path / "results").glob("*.csv"))
        assert tables and all(path.name.startswith("dry-run-on-") for path in tables)
        rows = [list(csv.DictReader(path.open())) for path in tables]
        assert all(row["device"].startswith("dry run on ") for table in rows for row in table)
        measured.append([len(table) for table in rows])
    assert measured[0] == measured[1] or part == "tests"  # skipped ones have not passed


# Predictions


def test_programs_on_a_multiprocessor_are_bounded_by_each_of_its_resources():
    # NVIDIA's table for compute capability 9.0: 65536 registers, 228 KiB with 1 KiB for each program, 2048 threads.
    assert expected_times.Code(registers=128, shared=73728, warps=4).per_multiprocessor == 3  # shared memory
    assert expected_times.Code(registers=255, shared=0, warps=8).per_multiprocessor == 1  # registers
    assert expected_times.Code(registers=32, shared=0, warps=8).per_multiprocessor == 8  # threads
    assert expected_times.Code(registers=16, shared=0, warps=1).per_multiprocessor == 32  # programs


def test_prediction_is_the_slowest_of_its_bounds():
    code = expected_times.Code(registers=128, shared=73728, warps=4)
    launch = expected_times.Launch(memory=4.32e9, l2=0, operations=0, programs=10**6, ahead=2**16)
    took = expected_times.predict(launch, code)
    assert took.bound == "memory" and took.microseconds == pytest.approx(1002)
    few = dataclasses.replace(launch, programs=1)  # one program alone has 64 KiB on their way at a time
    took = expected_times.predict(few, code)
    assert took.bound == "latency" and took.microseconds == pytest.approx(2 + 4.32e9 / 2**16 * 0.8, rel=1e-3)
    half = expected_times.Launch(memory=0, l2=0, operations=989e9, programs=132 * 3 // 2, ahead=1)
    took = expected_times.predict(half, code, share=1.0)
    assert took.bound == "tensor cores" and took.microseconds == pytest.approx(2002)


@pytest.mark.slow
def test_log_holds_the_predictions_that_the_command_prints():
    command = [sys.executable, "-m", "benchmarks.expected_times"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    log = (ROOT / "benchmarks/LOG.md").read_text()
    assert printed.count("\n|") > 20 and [line for line in printed.splitlines() if line not in log] == []


def test_reference_step_sums_over_parts_of_the_batch():
    case = Case("miniature", 2 * EVALUATED_AT_ONCE + 1, 8, dtype=torch.float32)
    script = PeftStep(case, torch.device("cpu"), Levers())
    noise_and_times = torch.randn(case.batch, 4, case.side, case.side), torch.rand(case.batch)
    whole = script._mean_loss(script._latents, *noise_and_times, script._condition)
    whole.backward()
    torch.nn.utils.clip_grad_norm_(script.trainable.values(), MAX_NORM)
    wanted = {name: parameter.grad for name, parameter in script.trainable.items()}

    loss, gradients = script.evaluate(noise_and_times)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    size = float(torch.stack([tensor.norm() for tensor in wanted.values()]).norm())
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-5 * size)


def test_restored_images_are_compared_by_their_peak_signal_to_noise_ratio():
    (image,) = source_table.targets([3], 1, seed=0)
    for task in source_table.TASKS:
        source = source_table.damaged(image, task)
        mean = np.square(np.asarray(source, np.float64) - np.asarray(image)).mean()
        assert source.size == image.size == (32, 32) and 0 < mean < 2000
        ratio, exact = source_table.psnr([source, image], [image, image])
        assert abs(ratio - 10 * np.log10(65025 / mean)) < 1e-9 and exact == pytest.approx(99)


@pytest.mark.slow
def test_every_kernel_is_launched_for_the_sanitizer():
    script = ROOT / "tests/kernels/small_launches.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "49 outputs, all finite" in done.stdout


TUNING = """
import random, sys, time
from pathlib import Path
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from benchmarks import clock, compile_ahead, lora_paths, tune_lora

folder, target = Path(sys.argv[1]), GPUTarget("cuda", 90, 32)
ahead = compile_ahead.Ahead(2, target)
compile_ahead.compile_only(target)  # without a GPU, Triton compiles or finds here too what it would launch
launched = []

def run(ops, o):
    launched.append(lora_paths.run_step(ops, o))
    return [0.0] * 4

def time_calls(call, inputs, *_):
    launched.append(call(*inputs()))
    return random.random(), 0.0, 0.0

tuner = tune_lora.Tuner(torch.device("cpu"), torch.bfloat16, 1, time.monotonic() + 3600, folder)
shapes = ((32, 32), (64, 32))
patches = {name: getattr(tune_lora, name)[:2] for name in ("SHRINK", "ROWS_SUM", "GRAD_B")} | {"errors_of": run}
with mock.patch.multiple(tune_lora, **patches), mock.patch.object(clock, "time_calls", time_calls):
    complete = tune_lora.tune(
        tuner, folder / "table.json", 90, {16: shapes, 64: shapes}, shapes[:1], tune_lora.WIDE[:2], ahead
    )
ahead.close()
print(complete, len(launched) > 50, ahead.missed, "missed")
"""


@pytest.mark.slow
def test_every_kernel_of_a_tuning_is_compiled_ahead(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", TUNING, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True True 0 missed", done.stdout


def test_tuning_continues_and_reports_where_compiling_ahead_fails(monkeypatch, capsys):
    monkeypatch.setattr(knobs.compilation, "listener", None)
    ahead = Ahead(1)
    for rank in (16, 32):
        ahead.wait([Launch("unknown", Tile(64, 64, 64, 4, 2), 32, 32, rank)])
    ahead.close()
    printed = capsys.readouterr().out
    assert printed == "compiling ahead failed, kernels compile where they are launched: KeyError: 'unknown'\n"


def test_few_steps_table_compares_a_lora_with_the_best_setting_of_the_base(tmp_path, capsys):
    """Features moved by d lie at a squared distance of d² from real ones, so that the ratio of 1 to 2 is 1/4."""
    random = np.random.default_rng(0)
    for seed in (0, 1):
        real, reference = random.normal(size=(500, 4)), random.normal(size=(800, 4))
        np.savez(tmp_path / f"real, 500 images, seed {seed}.npz", features=real, reference=reference)
        for network, setting, moved in (("base", "euler", 2), ("base", "ddim", 3), ("reflow", "euler", 1)):
            features = random.normal((moved, 0, 0, 0), size=(500, 4))
            kept = {"captions": "captions", "evaluations": 2, "features": features, "right_names": np.ones(500, bool)}
            np.savez(tmp_path / f"{network} {setting} {seed}.npz", network=network, setting=setting, seed=seed, **kept)
    (rows,) = few_steps_table.read(tmp_path, repeats=50).values()
    few_steps_table.print_table(rows)
    printed = capsys.readouterr().out
    line = r"reflow, 2 evaluations, seeds 0, 1: (.*) \((.*) to (.*)\) times the base's best at 1 or 2 .* \(euler\)"
    value, low, high = map(float, re.search(line, printed).groups())
    assert 0.2 < low < 0.25 < high < 0.3 and low < value < high
    assert "| base | 2 | ddim | 0, 1 | " in printed and printed.count("100.0% |") == 3
    assert "at more evaluations" not in printed


def test_options_of_every_case_are_those_of_a_training(tmp_path):
    options = argparse.Namespace(steps=3, warmup=1, batch=2, learning_rate=None, output=tmp_path, pictures=tmp_path)
    options.rooms = tmp_path
    for case in filter("base".__ne__, resolution_table.CASES):
        command = parse(resolution_table.arguments(case, 48, 0, options, tmp_path))
        assert command.options.adapter == case.partition("_")[0] and command.options.resolution == 48
        assert command.options.learning_rate == {"lora": 1e-3, "full": 3e-4}[command.options.adapter]
    options.learning_rate = 2e-3
    for case in depth_table.CASES:
        command = parse(depth_table.arguments(case, 0, options, tmp_path))
        assert command.task == "depth" and command.options.learning_rate == 2e-3
        jumps = case.endswith("one_step")
        assert command.options.distill is jumps
        steps = depth_table.steps_of(case, argparse.Namespace(sampling_steps=[2, 4]))
        assert steps == ((1,) if jumps else (2, 4))
    for case in source_table.CASES:
        command = parse(source_table.arguments(case, 0, options, tmp_path, tmp_path))
        assert command.task == "image_to_image" and command.options.objective == source_table.CASES[case]["objective"]


def test_table_of_depth_has_the_steps_that_each_case_was_measured_at(tmp_path):
    for case, steps in (("lora_diff2flow", ("1", "2")), ("lora_one_step", ("1",))):
        for seed in (0, 1):
            errors = {number: [{"abs_rel": 0.1 * (seed + 1), "delta1": 0.9}] * 3 for number in steps}
            (tmp_path / f"{case}-{seed}.json").write_text(json.dumps({"case": case, "seed": seed, "errors": errors}))
    lines = [line.split("|")[1:4] for line in depth_table.table(tmp_path)[2:]]
    shown = [("lora_diff2flow", "1"), ("lora_diff2flow", "2"), ("lora_one_step", "1")]
    assert lines == [[f" {case} ", " 0, 1 ", f" {steps} "] for case, steps in shown]
    assert "0.150 (0.150 to 0.150)" in depth_table.table(tmp_path)[-1]
    (share,) = depth_table.comparison(tmp_path)[2:]
    assert share == "| lora_diff2flow | lora_one_step | 0, 1 | 1 | 1.00 (1.00 to 1.00) |"


def test_errors_of_two_objectives_are_compared_on_the_same_images_and_seeds(tmp_path):
    for case, seed, values in (
        ("full_diff2flow", 0, [0.1, 0.3]),
        ("full_diff2flow", 1, [0.9, 0.9]),
        ("full_diffusion", 0, [0.2, 0.6]),
        ("lora_diffusion", 0, [1.0, 1.0]),
    ):
        row = {"case": case, "seed": seed, "errors": {"4": [{"abs_rel": value} for value in values]}}
        (tmp_path / f"{case}-{seed}.json").write_text(json.dumps(row))
    (share,) = depth_table.comparison(tmp_path)[2:]
    assert share == "| full_diff2flow | full_diffusion | 0 | 4 | 0.50 (0.50 to 0.50) |"


def test_rows_of_other_options_are_refused():
    same = {"a.json": {"steps": 3, "sampling_steps": [1, 2]}, "b.json": {"steps": 3, "sampling_steps": [1, 2]}}
    kept_rows.same_options(same)
    kept_rows.same_options(same, {"steps": 3, "sampling_steps": (1, 2)})
    kept_rows.same_options({"a.json": None, "b.json": None})
    kept_rows.same_options({}, {"steps": 3})
    for kept, now in ((same, {"steps": 4}), ({"a.json": {"steps": 3}, "b.json": {"steps": 4}}, None)):
        with pytest.raises(SystemExit, match=r"json was made with steps ., and others with .: give the same options"):
            kept_rows.same_options(kept, now)
    with pytest.raises(SystemExit, match=r"a\.json does not say with which options it was made: move it away"):
        kept_rows.same_options({"a.json": None}, {"steps": 3})
