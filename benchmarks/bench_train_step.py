"""Measure a whole training step with LoRA: diffusers' script with peft, lever by lever, and `AlignedTrainer.step`.

    pytest --benchmark benchmarks/bench_train_step.py
    bash benchmarks/gpu_quarter.sh FOLDER                 # on a GPU: the rows that decide, in a quarter of an hour
    pytest --benchmark --go_on benchmarks/bench_train_step.py -k '[b16_rest'       # and the others of one stage

Providers: "script", the step of diffusers' LoRA script; "peft …", the same with levers (torch.compile, channels_last,
fused AdamW, CUDA graph; "peft best" has all); "base only", peft best without an adapter; and "d2f_fast", which compiles
and, on a GPU, captures the step, with rows that leave levers out. Where a name ends with "blocks", the blocks that the
network repeats are compiled, for peft by the same function as ours (diffusers' own compile_repeated_blocks leaves out
the residual blocks), and else the whole step. Each row is one provider on one case. Before it is
timed, its loss and clipped gradients must agree with the script's for the noise and times of one of its steps: the
relative differences must lie within ALLOWED, the gradients taken as one vector of all of A and B.

Columns of `results/<device>-train-step.csv`, to which each row is appended as soon as it is measured:

    first_step_s      the first step, compiling and capturing included, from an empty cache of compiled code ("cold"),
                      or from the cache that TORCHINDUCTOR_CACHE_DIR names ("kept")
    to_step_500_s     the first three steps, and 497 times the median
    floor_ms          the least work of a step (`unets.least_work`) at the copy bandwidth and the matrix product rate of
                      the same run; share_of_ceiling = floor / median
    vs_script         time of the script's step over that of the row; on a CPU the two take turns, round by round
    peak_mib          on a GPU, the most memory allocated at once above what was there before the row
    kernels, host_ms  on a GPU, kernels and copies per step, and how long the host is busy with them

Memory caps, aspect-ratio buckets, and the first step with a cold and a warm cache have tables of their own.
"""

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import clock
from benchmarks.train_steps import (
    Levers,
    PeftStep,
    TrainerStep,
    first_step_seconds,
    trainer_noise_and_times,
)
from benchmarks.unets import Case, batch_of, least_work
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE

CUDA = torch.cuda.is_available()
# Largest relative differences of the loss and of the gradients. In float32 only the order of sums differs. In bfloat16
# every product of a deep network is rounded at 4e-3: the gradients of the script and ours both differ from float32's by
# 1.6e-2 (miniature, CPU).
ALLOWED = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (5e-3, 5e-2)}
LATER_STEPS, ROW_SECONDS, MOST_ROUNDS = 500, 10.0, 30
# Calls between two waits for the device: on a GPU the host prepares a step while the last one runs, as in training.
LEAST_CALLS = 4 if CUDA else 1
# All levers together. On a CPU there is nothing to capture.
BEST = Levers(compiled="step", channels_last=True, fused=True, captured=CUDA)
Provider = Callable[[Case, torch.device], Any]


def peft(**levers: Any) -> Provider:
    """Return a provider: the script's step with these levers."""
    return lambda case, device: PeftStep(case, device, Levers(**levers))


def best(**levers: Any) -> Provider:
    """Return a provider: the step with all levers, changed by these."""
    return lambda case, device: PeftStep(case, device, dataclasses.replace(BEST, **levers))


def ours(**options: Any) -> Provider:
    """Return a provider: the step of `AlignedTrainer` with these options."""
    return lambda case, device: TrainerStep(case, device, **options)


FULL: dict[str, Any] = {"compile": "full", **({"cuda_graph": True} if CUDA else {})}
BLOCKS = FULL | {"compile": "regional"}
# Providers in the order in which they are measured, the most important first, because a run may be cut.
PROVIDERS: dict[str, Provider] = {
    "d2f_fast, blocks": ours(**BLOCKS),
    "peft best, blocks": best(compiled="blocks"),
    "d2f_fast": ours(**FULL),
    "peft best": best(),
    "peft compiled": peft(compiled="network"),
    "script": peft(),
    "base only": best(adapter=False),
    "peft compiled, channels_last": peft(compiled="network", channels_last=True),
    "peft compiled step, channels_last, fused AdamW": best(captured=False),
    "d2f_fast compiled": ours(compile="full"),
    "d2f_fast eager": ours(compile="off"),
    "d2f_fast eager, captured": ours(compile="off", cuda_graph=True),
    "script, no input cast": peft(input_cast=False),
    "script, channels_last": peft(channels_last=True),
    "d2f_fast with EMA": ours(**FULL, ema_decay=0.999),
    "d2f_fast, addmm": ours(**FULL),
    "d2f_fast, flash attention": ours(**FULL),
    "d2f_fast, efficient attention": ours(**FULL),
    "d2f_fast, cudnn attention": ours(**FULL),
    "peft best, max-autotune": best(mode="max-autotune-no-cudagraphs"),
}
ONLY_ON_A_GPU = {"d2f_fast compiled", "d2f_fast eager, captured", "d2f_fast, addmm", "peft best, max-autotune"} | {
    name for name in PROVIDERS if name.endswith("attention")
}
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ALL = list(PROVIDERS)
RIVALS = ["d2f_fast, blocks", "peft best, blocks", "script"]
COMPILED = ["d2f_fast", "peft best"]
LEVERS = [name for name in ALL if name not in RIVALS + COMPILED]
UNCOMPILED = ["d2f_fast eager, captured", "script"]
# Stages named "first" are what gpu_quarter.sh measures. Compiling takes most of a row's time, and 250 to 400 s for the
# whole of SDXL.
STAGES: dict[str, list[tuple[Case, list[str]]]] = {
    "cpu": [
        (case, [name for name in ALL if name not in ONLY_ON_A_GPU])
        for case in (Case("miniature", 16, 8), Case("sd15 halved", 1, 32))
    ],
    "b16 first": [(Case("sd15", 16, 64), RIVALS + COMPILED)],
    "b16 rest": [
        (Case("sd15", 64, 64), RIVALS),
        (Case("sd15", 16, 64), LEVERS),
        (Case("sd15", 16, 64, 64), RIVALS),
        (Case("sd15", 4, 64), RIVALS),
        (Case("sd15", 16, 64, targets=None), RIVALS),
        (Case("sd21", 16, 64), RIVALS),
    ],
    "b1 first": [(Case("sd15", 1, 64), RIVALS)],
    "b1 rest": [
        (Case("sd15", 1, 64), COMPILED + LEVERS),
        (Case("sd15", 1, 64, 64), RIVALS),
        (Case("sd21", 1, 64), RIVALS),
    ],
    "sdxl first": [(Case("sdxl", 4, 128), UNCOMPILED + RIVALS[:2])],
    "sdxl rest": [
        (Case("sdxl", 4, 128), COMPILED),
        *((Case("sdxl", 1, 128, rank), UNCOMPILED) for rank in (16, 64)),
        *((Case("sdxl", 1, 128, rank), COMPILED) for rank in (16, 64)),
    ],
}
DRY = Case("miniature", 2, 8)
ROWS = [
    pytest.param(stage, case, provider, id=f"{stage}-{case}-{provider}".replace(" ", "_"))
    for stage, cases in STAGES.items()
    for case, providers in cases
    for provider in providers
]


@pytest.fixture
def step_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return a function that makes a provider's step, and undo its settings at the end of the test."""
    with contextlib.ExitStack() as stack:
        torch.compiler.reset()
        clear()

        def make(case: Case, provider: str, device: torch.device) -> Any:
            if not clock.KEEPS_COMPILED_CODE:
                stack.enter_context(fresh_cache())
            if provider.endswith("addmm"):
                monkeypatch.setenv(PATH_VARIABLE, "addmm")
            if provider.endswith("attention"):
                stack.enter_context(sdpa_kernel(ATTENTION[provider.split()[-2]]))
            return PROVIDERS[provider](case, device)

        yield make
    torch.compiler.reset()


class Script:
    """Hold the script's step on the current case, which checks every provider and, on a CPU, is timed beside each."""

    _held: tuple[Case, PeftStep] | None = None

    @classmethod
    def on(cls, case: Case, device: torch.device) -> PeftStep:
        """Return the script's step on a case; the step of another case is dropped first."""
        if cls._held is None or cls._held[0] != case:
            cls._held = None
            clear()
            cls._held = case, PeftStep(case, device, Levers())
        return cls._held[1]


def clear() -> None:
    """Release unused memory to the device, and restart its record of the peak."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_above(before: int) -> int:
    """Return the most bytes allocated at once since the last `clear`, minus those before; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() - before if CUDA else 0


def differences(step: Any, case: Case, device: torch.device) -> tuple[float, float]:
    """Return the relative differences of a step's loss and gradients from the script's, at the initial parameters."""
    adapter = not isinstance(step, PeftStep) or step.levers.adapter
    if isinstance(step, PeftStep):
        step.restore()
        step()
        noise_and_times = step.noise_and_times
    else:
        noise_and_times = trainer_noise_and_times(case, device)  # the trainer has taken its first step
    loss, gradients = Script.on(case, device).evaluate(noise_and_times, zero_adapter=not adapter)
    of_loss = abs(float(step.loss - loss)) / abs(float(loss))
    got, want = step.gradients(), gradients if adapter else {}
    error = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    size = sum(float(tensor.double().square().sum()) for tensor in want.values())
    assert not adapter or (got.keys() == want.keys() and size > 0)
    return of_loss, math.sqrt(error / size) if adapter else 0.0


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one call."""
    return clock.seconds_of(step, device, 1)


def time_rounds(
    step: Callable[[], None], beside: Callable[[], None] | None, device: torch.device, most: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of a step in each round, and those of the step that takes turns with it."""
    once = seconds_of(step, device) + (seconds_of(beside, device) if beside else 0)
    calls = max(LEAST_CALLS, round(0.05 / once))
    rounds = max(3, min(most, int(ROW_SECONDS / (calls * once))))

    def several(step: Callable[[], None]) -> float:
        return seconds_of(lambda: [step() for _ in range(calls)] and None, device) / calls

    pairs = [(several(step), several(beside) if beside else math.nan) for _ in range(rounds)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def device_kernels(step: Callable[[], None]) -> int:
    """Return the number of kernels and copies that the device runs in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def host_seconds(step: Callable[[], None], repeats: int = 5) -> float:
    """Return the seconds that the host takes to launch a step on an idle device."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@pytest.mark.parametrize(("stage", "case", "provider"), ROWS)
def test_train_step(step_of, device, record, dry_run, stage, case, provider):
    if dry_run and (CUDA or provider not in ONLY_ON_A_GPU):
        case = DRY
    elif (stage == "cpu") == CUDA:
        pytest.skip(f"for a {'CPU' if CUDA else 'CUDA GPU'}")
    script = Script.on(case, device)
    if CUDA:
        script_seconds(case)  # before another step's graph takes the memory that its activations need
    clear()
    before = torch.cuda.memory_allocated() if CUDA else 0
    step = step_of(case, provider, device)
    clear()
    first = [seconds_of(step, device)]
    peak = peak_above(before)  # before the script, which checks the step, allocates too
    of_loss, of_gradients = differences(step, case, device)
    allowed = ALLOWED[case.dtype]
    assert of_loss <= allowed[0] and of_gradients <= allowed[1], f"{provider}: {of_loss:.1e}, {of_gradients:.1e}"
    first += [seconds_of(step, device) for _ in range(2)]
    clear()
    compiled = counters["stats"]["unique_graphs"]
    seconds, beside = time_rounds(step, None if CUDA else script, device, 3 if dry_run else MOST_ROUNDS)
    assert counters["stats"]["unique_graphs"] == compiled, f"{provider} compiled again after its third step"
    peak = max(peak, peak_above(before))
    median, p20, p80 = clock.quantiles_of(seconds)
    pairs = zip(seconds, beside, strict=True)
    vs_script = statistics.median(theirs / own for own, theirs in pairs) if not CUDA else script_seconds(case) / median
    work = least_work(case, provider != "base only")
    copy_rate, matmul_rate = clock.copy_rate(device), clock.matmul_rate(device)
    floor = work.seconds(matmul_rate, copy_rate)
    host = f"{host_seconds(step) * 1e3:.4g}" if CUDA else ""
    kernels = device_kernels(step) if CUDA else ""  # last, because every launch after a profiler is slower
    record(
        "train-step",
        {
            "clock_mhz": clock.clock_mhz(device),
            "case": str(case),
            "provider": provider,
            "compile_cache": "kept" if clock.KEEPS_COMPILED_CODE else "cold",
            "median_ms": f"{median * 1e3:.4g}",
            "p20_ms": f"{p20 * 1e3:.4g}",
            "p80_ms": f"{p80 * 1e3:.4g}",
            "rounds": len(seconds),
            "images_per_s": f"{case.batch / median:.4g}",
            "vs_script": f"{vs_script:.3f}",
            "first_step_s": f"{first[0]:.4g}",
            "to_step_500_s": f"{sum(first) + (LATER_STEPS - len(first)) * median:.4g}",
            "peak_mib": round(peak / 2**20) if CUDA else "",
            "kernels": kernels,
            "host_ms": host,
            "gflop": f"{work.flops / 1e9:.5g}",
            "gbyte": f"{work.bytes_moved / 1e9:.4g}",
            "tflop_per_s": f"{work.flops / median / 1e12:.4g}",
            "matmul_tflop_per_s": f"{matmul_rate / 1e12:.4g}",
            "share_of_matmul": f"{work.flops / median / matmul_rate:.4f}",
            "copy_gb_per_s": f"{copy_rate / 1e9:.4g}",
            "floor_ms": f"{floor * 1e3:.4g}",
            "share_of_ceiling": f"{floor / median:.4f}",
            "loss_difference": f"{of_loss:.1e}",
            "gradient_difference": f"{of_gradients:.1e}",
        },
    )


_SCRIPT_SECONDS: dict[Case, float] = {}


def script_seconds(case: Case) -> float:
    """Return the median seconds of the script's step on a GPU, timed once per case."""
    if case not in _SCRIPT_SECONDS:
        assert Script._held is not None
        step, device = Script._held[1], torch.device("cuda")
        for _ in range(3):
            step()
        _SCRIPT_SECONDS[case] = statistics.median(time_rounds(step, None, device, MOST_ROUNDS)[0])
        clear()
    return _SCRIPT_SECONDS[case]


# SDXL runs eagerly, because compiling it takes minutes.
CAPS = [
    (Case("sd15", 1, 64), "d2f_fast", 6),
    (Case("sdxl", 1, 128, checkpointing=True), "d2f_fast eager, captured", 10),
]


@pytest.mark.parametrize(("case", "provider", "gigabytes"), CAPS, ids=["b1", "sdxl"])
def test_memory_cap(step_of, device, record, case, provider, gigabytes):
    """Build the network and take steps under a hard cap on the memory that torch's allocator may reserve.

    The allocator releases unused blocks only at the cap, so that less than reserved_gb may suffice. Memory of the
    driver, for its context, compiled kernels and the graph's nodes, counts neither in reserved_gb nor in the cap.
    """
    if not CUDA:
        pytest.skip("needs a CUDA GPU")
    Script._held = None
    clear()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    try:
        step = step_of(case, provider, device)
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        reserved = torch.cuda.max_memory_reserved()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert step.loss.isfinite()
    row = {"case": str(case), "provider": provider, "cap_gb": gigabytes, "reserved_gb": f"{reserved / 1e9:.3f}"}
    record("memory-cap", row)


@pytest.mark.parametrize("provider", ["d2f_fast", "d2f_fast, blocks"])
def test_first_step(device, record, dry_run, tmp_path, monkeypatch, provider):
    """Time our first step in two processes in turn; they share a cache of compiled code, which starts empty."""
    case = DRY if dry_run else Case("sd15", 1, 64) if CUDA else Case("miniature", 16, 8)
    Script._held = None
    clear()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    spawn, seconds = multiprocessing.get_context("spawn"), []
    for _ in range(2):
        with ProcessPoolExecutor(1, spawn) as process:
            options = FULL if provider == "d2f_fast" else BLOCKS
            seconds.append(process.submit(first_step_seconds, case, device, options).result())
    row = {"case": str(case), "provider": provider, "cold_s": f"{seconds[0]:.4g}", "warm_s": f"{seconds[1]:.4g}"}
    record("first-step", row)


def test_buckets(step_of, device, record):
    """Time our steps over all aspect ratios of a resolution, three times: only the first ones compile."""
    # Widths from 384 to 1536 by 64, of the area of 768 x 768 pixels; on a CPU, three of the miniature's.
    case, unit, widths = (Case("sd21", 1, 96), 8, range(48, 193, 8)) if CUDA else (DRY, 2, range(4, 17, 6))
    shapes = [(case.side**2 // width // unit * unit, width) for width in widths]
    step = step_of(case, "d2f_fast", device)
    batches = []
    for height, width in shapes:
        latents = torch.randn(case.batch, 4, height, width, device=device)
        batches.append({**batch_of(case, device), "latents": latents})

    def visit() -> float:
        def steps() -> None:
            for batch in batches:
                step.batch = batch
                step()

        return seconds_of(steps, device)

    first, second, third = visit(), visit(), visit()
    row = {"case": str(case), "provider": "d2f_fast", "buckets": len(shapes), "first_s": f"{first:.4g}"}
    record("buckets", {**row, "second_s": f"{second:.4g}", "third_s": f"{third:.4g}"})
