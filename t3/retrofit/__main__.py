"""The command line: `python -m t3.retrofit CONFIG.toml`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
