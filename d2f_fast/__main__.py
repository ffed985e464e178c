"""Start `d2f`: handle signals first, and only then import the commands, which takes longer."""

import sys

from d2f_fast.stopping import run_until_stopped


def main() -> int:
    """Run the command line of this process, and return the exit code."""
    return run_until_stopped("d2f", _run, ends_process=True)


def _run() -> int:
    from d2f_fast.commands.main import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
