"""``python -m tune_amp``: the same as ``tune-amp``."""

from tune_amp.cli.main import run

run()
