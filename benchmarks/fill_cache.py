"""Take the first step of the rivals of bench_train_step at once, so that the cache of compiled code is warm for all.

    TORCHINDUCTOR_CACHE_DIR=FOLDER python -m benchmarks.fill_cache

Each step runs in a process of its own, two at a time: this package's and peft's, at batch 16 and then at batch 1. What
is compiled stays in the cache when the command is stopped. Nothing is measured: the printed seconds are those of
processes that share the GPU and its host.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.bench_train_step import DRY, PROVIDERS, RIVALS
from benchmarks.unets import Case

CASES = (Case("sd15", 16, 64), Case("sd15", 1, 64))
PROCESSES = 2


def first_step(case: Case, provider: str) -> str:
    """Build a network, take the first step of a provider, and return a line that says how long both took."""
    started, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    PROVIDERS[provider](case, device)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return f"{case}, {provider}: {time.monotonic() - started:.0f} s"


def main() -> None:
    """Fill the cache, and print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--dry_run", action="store_true", help="use the miniature, which a CPU compiles too")
    cases = (DRY,) if parser.parse_args().dry_run else CASES
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit the CUDA context
    with ProcessPoolExecutor(PROCESSES, spawn, max_tasks_per_child=1) as pool:
        steps = [pool.submit(first_step, case, provider) for case in cases for provider in RIVALS[:2]]
        for step in steps:
            try:
                print(step.result(), flush=True)
            except Exception as error:  # the others go on; the row itself will say what is wrong
                print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
