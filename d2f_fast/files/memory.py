"""How much memory this process has taken."""

import re
import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Most bytes of physical memory that this process held at once."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux' ru_maxrss begins with that of the process that started this one.
        (high_water,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(high_water) * 1024
    # macOS gives bytes, other systems kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
