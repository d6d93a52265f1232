"""Search for the settings under which mixed-precision training works best: ``python scripts/search.py --help``."""

import sys

from tune_amp.cli.search import search_command

if __name__ == "__main__":
    sys.exit(search_command())
