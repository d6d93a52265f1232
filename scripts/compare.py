"""Compare the precisions on a configuration that a search found: ``python scripts/compare.py --help``."""

import sys

from tune_amp.cli.compare import compare_command

if __name__ == "__main__":
    sys.exit(compare_command())
