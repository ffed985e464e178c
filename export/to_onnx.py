"""Export an aligned diffusers pipeline to ONNX graphs: `python export/to_onnx.py --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as `python export/to_onnx.py`: import the checkout, not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from d2f_fast import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, and return the exit code: 2, for the export is refused until it is built."""
    parser = argparse.ArgumentParser(
        prog="to_onnx.py",
        description="Export an aligned diffusers pipeline to ONNX graphs. ONNX export is not built yet.",
    )
    parser.add_argument("--version", action="version", version=f"d2f_fast {__version__}")
    parser.parse_known_args(arguments)  # known: whatever options are typed, the answer below is the useful one
    print(f"{parser.prog}: error: ONNX export is not built yet", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
