"""Export a Stable Diffusion pipeline, aligned or not, to ONNX graphs: `python export/to_onnx.py --help`.

Exit codes: 0 done, 1 a graph does not compute what torch computes, 2 refused input, 130 stopped by Ctrl-C, 141 the
output has no reader, 143 stopped by SIGTERM.
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as `python export/to_onnx.py`: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from d2f_fast import __version__
from d2f_fast.stopping import run_until_stopped, unless_stopped

if TYPE_CHECKING:
    from d2f_fast.export.options import ExportOptions

PROGRAM = "to_onnx.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code.

    Args:
        arguments: words after the program's name; None takes those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"d2f_fast {__version__}")
        return 0
    # A signal raises an exception, so that the unfinished folder is removed.
    return run_until_stopped(PROGRAM, partial(_run, given), ends_process=arguments is None)


def _run(given: list[str]) -> int:
    """Parse the options and export, and return the exit code."""
    # These imports take a while, in which a signal is handled already.
    from d2f_fast.errors import RefusedInputError
    from d2f_fast.export.options import parse

    try:
        return _export(parse(given, PROGRAM))
    except RefusedInputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def _export(options: "ExportOptions") -> int:
    """Export, print the result, and return the exit code."""
    from d2f_fast.export.output_place import check_place

    started = time.monotonic()
    # All of this comes before torch is imported.
    options.check()
    if not options.verify_only:
        check_place(Path(options.output).resolve())
    options.check_files()
    from d2f_fast.models.library_messages import silence_libraries

    silence_libraries()
    from d2f_fast.export.folder import export_folder
    from d2f_fast.export.verify import VerificationError, table_of
    from d2f_fast.files.memory import peak_resident_bytes

    try:
        report = unless_stopped(partial(export_folder, options))
    except VerificationError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    if options.json:
        costs = {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_resident_bytes()}
        print(json.dumps(report | costs))
        return 0
    for adapter in report["adapters"]:
        print(
            "merged {file} at scale {scale}: {layers} layers, weights changed by {relative_change:.2%}".format(
                **adapter
            )
        )
    print(table_of(report["parity"]))
    for name, found in report["tensorrt"].items():
        verdict = f"yes, from {found['minimum_tensorrt']}" if found["ready"] else "; ".join(found["problems"][:3])
        print(f"{name:32} TensorRT-ready: {verdict}")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
