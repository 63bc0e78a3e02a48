"""``python -m laps.cli``, which torchrun can start."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
