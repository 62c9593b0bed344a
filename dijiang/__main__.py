"""`python -m dijiang` is the `dijiang` command."""

import sys

from dijiang.cli import main

if __name__ == "__main__":
    sys.exit(main())
