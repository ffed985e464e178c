"""Run the `d2f` command line by `python -m d2f_fast`."""

import sys

from d2f_fast.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
