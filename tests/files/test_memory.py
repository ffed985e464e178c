"""The peak memory that metrics.json, the export and the benchmarks report."""

import subprocess
import sys

from d2f_fast.files.memory import peak_resident_bytes

CHILD = "from d2f_fast.files.memory import peak_resident_bytes; print(peak_resident_bytes())"


def test_the_peak_outlives_the_memory_and_is_this_process_own():
    before = peak_resident_bytes()
    held = b"\1" * (2 * before)
    assert peak_resident_bytes() >= len(held)
    del held
    assert peak_resident_bytes() >= 2 * before
    # getrusage would give it this process' peak.
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert int(child.stdout) < before
