"""The clock of every benchmark, and the row that it writes: `measure`, shared by all files of this folder."""

import csv
import functools
import itertools
import math
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROWS = pytest.StashKey[list[dict[str, Any]]]()
ROUNDS = 30
ROUND_SECONDS = 0.01  # of one round: the clock's own cost, some 10 µs on a GPU, stays below 0.2 %


@pytest.fixture
def device() -> torch.device:
    """Where benchmarks run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Time one provider, print its row, and append it to `results/<device>.csv`.

    A benchmark asserts that the provider is right, then calls this once:

        measure(function, inputs, case="16x4x64x64 bf16", provider="ours", bytes_moved=..., flops=...)

    function: one call of what is measured, forward and backward as the benchmark's name says. It must not sync.
    inputs: gives one tuple of operands; on a GPU as many are made and taken in turn as overflow its L2 cache twice.
    case, provider: columns of the row; providers of one case are compared.
    bytes_moved, flops: the least that the operation needs (not what the provider does); the row holds the rate, and its
        share of the copy bandwidth or matrix product measured in the same run.
    graph: on a GPU, replay a CUDA graph of the calls: device time alone. False times eager launches, host included.

    Returns the row; times are of one call.
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
        where = next((x.device for x in _tensors(inputs()) if x.device.type == "cuda"), torch.device("cpu"))
        graph = graph and where.type == "cuda"
        target, calls = _round(function, inputs, where, graph)

        def seconds_per_call() -> float:
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            return time.perf_counter() / calls

        request.node.add_marker(pytest.mark.benchmark(group=case, timer=seconds_per_call))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(target, rounds=ROUNDS, warmup_rounds=2)
        seconds = sorted(benchmark.stats.stats.data)
        median, tenths = statistics.median(seconds), statistics.quantiles(seconds, n=10)
        copy_rate, matmul_rate = _copy_rate(where), _matmul_rate(where) if flops else 0.0
        row = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **_measured_on(),
            "clock_mhz": _clock_mhz(where),
            "benchmark": request.node.path.stem.removeprefix("bench_"),
            "case": case,
            "provider": provider,
            "timing": "graph" if graph else "launched",
            "median_us": f"{median * 1e6:.3f}",
            "p20_us": f"{tenths[1] * 1e6:.3f}",
            "p80_us": f"{tenths[7] * 1e6:.3f}",
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
        _append(row)
        request.config.stash.setdefault(ROWS, []).append(row)
        return row

    return measure


def _tensors(operands: Any) -> Iterable[Tensor]:
    return (x for x in operands if isinstance(x, Tensor))


def _round(
    function: Callable[..., Any], inputs: Callable[[], tuple[Any, ...]], where: torch.device, graph: bool
) -> tuple[Callable[[], None], int]:
    """What one round runs, about ROUND_SECONDS of it, and how many calls that is."""
    operands = [inputs()]
    if where.type == "cuda":
        size = sum(x.numel() * x.element_size() for x in _tensors(operands[0]))
        cold = 2 * torch.cuda.get_device_properties(where).L2_cache_size
        operands += [inputs() for _ in range(math.ceil(cold / max(size, 1)) - 1)]
    for _ in range(3):  # compiles, and fills caches
        function(*operands[0])
    if not graph:
        turns = itertools.cycle(operands)
        calls = max(1, round(ROUND_SECONDS / _seconds(lambda: function(*next(turns)), where)))

        def target() -> None:
            for _ in range(calls):
                function(*next(turns))

        return target, calls
    side = torch.cuda.Stream(where)
    side.wait_stream(torch.cuda.current_stream(where))
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*operands[0])
    torch.cuda.current_stream(where).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for taken in operands:
            function(*taken)
    replays = max(1, round(ROUND_SECONDS / _seconds(captured.replay, where)))

    def replay() -> None:
        for _ in range(replays):
            captured.replay()

    return replay, replays * len(operands)


def _seconds(function: Callable[[], Any], where: torch.device, repeats: int = 9) -> float:
    """Median time of a call, host and synchronisation included."""
    seconds = []
    for _ in range(repeats):
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        started = time.perf_counter()
        function()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@functools.cache
def _copy_rate(where: torch.device) -> float:
    """Bytes a second that `copy_` reads and writes, on operands far larger than the caches."""
    source = torch.ones((1 << 28 if where.type == "cuda" else 1 << 26) // 4, device=where)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _seconds(lambda: target.copy_(source), where)


@functools.cache
def _matmul_rate(where: torch.device) -> float:
    """Operations a second of a large matrix product: bfloat16 on a GPU, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (1024, torch.float32)
    a = torch.randn(side, side, device=where, dtype=dtype)
    return 2 * side**3 / _seconds(lambda: a @ a, where)


@functools.cache
def _clock_mhz(where: torch.device) -> str:
    """Clock of the GPU's multiprocessors under load; nothing on a CPU, or without nvidia-smi."""
    if where.type != "cuda" or not shutil.which("nvidia-smi"):
        return ""
    a = torch.randn(8192, 8192, device=where, dtype=torch.bfloat16)
    for _ in range(500):  # half a second or more on the device, queued at once
        a @ a
    uuid = f"GPU-{torch.cuda.get_device_properties(where).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    clock = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    torch.cuda.synchronize(where)
    return clock


@functools.cache
def _commit() -> str:
    """Short hash of the commit, "-dirty" where files other than results were changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    status = [*git, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout
    return (commit or "none") + ("-dirty" if changed else "")


def _processor() -> str:
    """Name of the CPU; `platform.processor()` is empty on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def _measured_on() -> dict[str, str]:
    """Device, commit and package versions of this run."""
    try:
        triton_version = version("triton")
    except PackageNotFoundError:
        triton_version = "none"
    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": str(torch.get_num_threads()),
    }


def _append(row: dict[str, Any]) -> None:
    """Add a row to the device's table at once: a run that is cut keeps what it measured."""
    slug = re.sub(r"[^a-z0-9]+", "-", row["device"].lower()).strip("-")
    path = Path(__file__).parent / "results" / f"{slug}.csv"
    path.parent.mkdir(exist_ok=True)
    header = path.open().readline().strip() if path.exists() else ",".join(row)
    assert header == ",".join(row), f"{path} has other columns than this version writes: move it away"
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(_measured_on())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    columns = ["benchmark", "case", "provider", "timing", "median_us", "p20_us", "p80_us"]
    columns += ["gb_per_s", "share_of_copy", "tflop_per_s", "share_of_matmul"]
    table = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if rows else []:
        terminalreporter.write_line("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)))
    terminalreporter.write_line("measured on: " + ", ".join(f"{key} {value}" for key, value in _measured_on().items()))


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in Stable Diffusion 1.5's exact sizes, 1.07 billion parameters, with random weights: 4 GB on disk."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from d2f_fast import load_miniature

    small = load_miniature()
    small.tokenizer.model_max_length = 77  # its words are ids below 2000, which the large vocabulary has too
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=small.tokenizer,
        unet=unet,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("sd15")
    pipeline.save_pretrained(folder)
    return folder
