"""`python -m d2f_fast` is `d2f`."""

import sys

from d2f_fast.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
