"""The command line: `python -m tools.small_model.study COMMAND`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
