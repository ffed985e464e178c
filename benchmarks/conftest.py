"""Provide the fixtures that every benchmark uses: `measure` times a function and writes a row."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock

ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
COMPLETE = pytest.StashKey[bool]()
ROUNDS = 30
DRY_ROUNDS = 2
DONE = "measured.txt"  # file beside the rows that lists the benchmarks that --go_on leaves out


def pytest_configure(config: pytest.Config) -> None:
    clock.DRY_RUN[0] = config.getoption("--dry_run")


@pytest.fixture
def device() -> torch.device:
    """Return the device that benchmarks run on: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Path:
    """Return the folder to which rows are written."""
    return Path(pytestconfig.getoption("--results"))


@pytest.fixture(scope="session")
def dry_run(pytestconfig: pytest.Config) -> bool:
    """Return whether everything runs once at its smallest size, so that the times mean nothing."""
    return bool(pytestconfig.getoption("--dry_run"))


@pytest.fixture
def record(request: pytest.FixtureRequest, results: Path) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Return a function that writes a row and prints it at the end of the run: `record("train-step", row)`."""

    def record(table: str, row: dict[str, Any]) -> dict[str, Any]:
        written = clock.append(row, table, results)
        if request.config.getoption("--go_on"):
            with (results / DONE).open("a") as file:
                file.write(f"{request.node.nodeid}\n")
        request.config.stash.setdefault(ROWS, {}).setdefault(table, []).append(row)
        return written

    return record


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, record: Callable[..., dict[str, Any]], dry_run: bool
) -> Callable[..., dict[str, Any]]:
    """Return a function that times one provider, prints its row, and writes it to `results/<device>.csv`.

    A benchmark first asserts that the provider computes the right result, then calls this once:

        measure(function, inputs, case="16x4x64x64 bf16", provider="d2f_fast", bytes_moved=..., flops=...)

    function: function to time. It must not wait for the device.
    inputs: function that returns one tuple of operands. On a GPU it is called as often as it takes to make operands of
        twice the size of the L2 cache, which are used in turn.
    case, provider: columns of the row; the providers of one case are compared with each other.
    bytes_moved, flops: least bytes and operations that any implementation needs; 0 leaves the rate out. The row holds
        the rate, and its share of the copy bandwidth or matrix product rate measured in the same run.
    graph: On a GPU, replay a CUDA graph of the calls, which times the device alone. False times eager launches and the
        host. It has no effect on a CPU.

    It returns the row, whose times are those of one call.
    """

    def measure(
        function: Callable[..., Any],
        inputs: Callable[[], tuple[Any, ...]],
        *,
        case: str,
        provider: str,
        bytes_moved: int = 0,
        flops: int = 0,
        graph: bool = True,
    ) -> dict[str, Any]:
        where = next((x.device for x in clock.tensors_of(inputs()) if x.device.type == "cuda"), torch.device("cpu"))
        graph = graph and where.type == "cuda"
        target, calls = clock.make_round(function, inputs, where, graph)

        def seconds_per_call() -> float:
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            return time.perf_counter() / calls

        request.node.add_marker(pytest.mark.benchmark(group=case, timer=seconds_per_call))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(target, rounds=DRY_ROUNDS if dry_run else ROUNDS, warmup_rounds=2)
        seconds = benchmark.stats.stats.data
        median, p20, p80 = clock.quantiles_of(seconds)
        copy_rate, matmul_rate = clock.copy_rate(where), clock.matmul_rate(where) if flops else 0.0
        row = {
            "clock_mhz": clock.clock_mhz(where),
            "benchmark": request.node.path.stem.removeprefix("bench_"),
            "case": case,
            "provider": provider,
            "timing": "graph" if graph else "launched",
            "median_us": f"{median * 1e6:.3f}",
            "p20_us": f"{p20 * 1e6:.3f}",
            "p80_us": f"{p80 * 1e6:.3f}",
            "rounds": len(seconds),
            "calls_a_round": calls,
            "bytes": bytes_moved,
            "gb_per_s": f"{bytes_moved / median / 1e9:.4g}" if bytes_moved else "",
            "copy_gb_per_s": f"{copy_rate / 1e9:.4g}",
            "share_of_copy": f"{bytes_moved / median / copy_rate:.4f}" if bytes_moved else "",
            "flops": flops,
            "tflop_per_s": f"{flops / median / 1e12:.4g}" if flops else "",
            "matmul_tflop_per_s": f"{matmul_rate / 1e12:.4g}" if flops else "",
            "share_of_matmul": f"{flops / median / matmul_rate:.4f}" if flops else "",
        }
        return record("", row)

    return measure


@pytest.hookimpl(trylast=True)  # after -k, which fails where nothing is left to select from
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = Path(config.getoption("--results"), DONE)
    if config.getoption("--go_on") and done.exists():
        measured = set(done.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in measured])
        items[:] = [item for item in items if item.nodeid not in measured]
        config.stash[COMPLETE] = not items


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash.get(COMPLETE, False):  # everything was measured before, which is a success
        session.exitstatus = pytest.ExitCode.OK


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(clock.measured_on())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for table, rows in config.stash.get(ROWS, {}).items():
        clock.print_table(rows, clock.SHOWN.get(table, list(rows[0])), terminalreporter.write_line)
    measured_on = ", ".join(f"{key} {value}" for key, value in clock.measured_on().items())
    terminalreporter.write_line(f"measured on: {measured_on}")
