"""Measure tune_amp itself: the same as ``python -m benchmarks``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a lent GPU machine has a checkout and nothing installed

from benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
