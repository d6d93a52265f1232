"""Train a configuration that a search found, and test it once: ``python scripts/train.py --help``."""

import sys

from tune_amp.cli.train import train_command

if __name__ == "__main__":
    sys.exit(train_command())
