"""python -m qcfs_fast: the command line."""

import sys

from .study.command_line import main

if __name__ == "__main__":
    sys.exit(main())
