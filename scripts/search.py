"""Search for the settings under which mixed-precision training works best: ``python scripts/search.py --help``."""

from tune_amp.cli.console import leave
from tune_amp.cli.search import search_command

if __name__ == "__main__":
    leave(search_command())
