"""The peak memory that metrics.json, the export and the benchmarks report."""

import subprocess
import sys

from d2f_fast.files.memory import peak_resident_bytes

CHILD = "from d2f_fast.files.memory import peak_resident_bytes; print(peak_resident_bytes())"


def test_peak_outlives_the_memory_and_belongs_to_this_process():
    before = peak_resident_bytes()
    held = b"\1" * (2 * before)
    assert peak_resident_bytes() >= len(held)
    del held
    assert peak_resident_bytes() >= 2 * before
    # The child's ru_maxrss would start at the peak of this process.
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert int(child.stdout) < before
