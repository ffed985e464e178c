"""Measure how much memory this process has used."""

import re
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Return the largest amount of physical memory that this process has held at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, ru_maxrss starts at the peak of the parent process; VmHWM does not.
        (high_water,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(high_water) * 1024
    # macOS reports bytes, other systems kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
