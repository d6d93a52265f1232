"""The command ``tune-amp compare``, which ``scripts/compare.py`` runs too: arguments, calls and printing."""

import argparse
import sys
from collections.abc import Sequence

from tune_amp.cli.console import (
    OneLineParser,
    add_winner_arguments,
    run_winner_command,
    take_consent,
)
from tune_amp.reuse.precision_verdicts import CPU_SEEDS, CUDA_SEEDS, LEAST_SEEDS
from tune_amp.search.options import MOST_SEEDS
from tune_amp.trial.config import MODELS, PRECISIONS, InputError, TrialConfig, check, checked_field
from tune_amp.trial.consent import consent_to
from tune_amp.trial.text import shown


def compare_command(arguments: Sequence[str] | None = None, program: str = "scripts/compare.py") -> int:
    """Compare the precisions on a configuration from a Parquet file. Return the exit code."""
    command = tuple(sys.argv[1:] if arguments is None else arguments)
    parser = _compare_parser(program)
    return run_winner_command(parser, command, lambda parsed: _compare(parsed, (program, *command)))


def _compare_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        program, "Train a configuration that a search found in every precision, and say what differs."
    )
    add_winner_arguments(parser, saved="results (compare-rank...")
    add = parser.add_argument
    add("--seeds", type=int, metavar="N", help=f"seeds for every precision ({CPU_SEEDS}; with CUDA {CUDA_SEEDS})")
    precisions = ",".join(PRECISIONS)
    add("--precisions", default=precisions, metavar="A,B", help="what is compared; fp32 always is (%(default)s)")
    add("--max-epochs", type=int, metavar="N", help="epochs of a run (the configuration's, or as many as fit in 7 min)")
    add("--models", metavar="A,B", help=f"map these models too: {', '.join(MODELS)} or MODULE:FUNCTION")
    add("--batch-sizes", metavar="N,N", help="map these batch sizes too")
    return parser


def _check_flags(arguments: argparse.Namespace) -> None:
    """Check the flags as far as possible without the data, and replace lists of names by tuples.

    Raises:
        InputError: a flag breaks its rule.
    """
    arguments.precisions = _split("--precisions", arguments.precisions, "precision")
    arguments.models = _split("--models", arguments.models, "model")
    seeds, max_epochs = arguments.seeds, arguments.max_epochs
    if seeds is not None:
        rule = f"must be at least {LEAST_SEEDS} (one run does not show the noise)"
        check("--seeds", seeds, seeds >= LEAST_SEEDS, rule)
        check("--seeds", seeds, seeds <= MOST_SEEDS, f"must be at most {MOST_SEEDS:,}")
    if max_epochs is not None:
        check("--max-epochs", max_epochs, max_epochs >= 2, "must be at least 2 (the first epoch is not timed)")
        checked_field("--max-epochs", max_epochs, TrialConfig, "max_epochs")
    arguments.batch_sizes = _split("--batch-sizes", arguments.batch_sizes, "batch_size")


def _split(flag: str, text: str | None, field: str) -> tuple[str | int, ...]:
    """Return the values that a flag joins by commas, each checked as the ``field`` of a ``TrialConfig``."""
    names: list[str | int] = [] if text is None else [name.strip() for name in text.split(",")]
    check(flag, text, "" not in names, "must be names joined by commas")
    check(flag, text, len(set(names)) == len(names), "must name none twice")
    if field == "batch_size":
        for place, name in enumerate(names):
            try:
                names[place] = int(name)
            except ValueError:
                raise InputError(f"{flag}: must be whole numbers joined by commas, got {shown(name)}") from None
    return tuple(checked_field(flag, name, TrialConfig, field) for name in names)


def _compare(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    _check_flags(arguments)
    from tune_amp.results.records import load_best_file

    best = load_best_file(arguments.best)
    config = best.pick(arguments.rank).trial.config
    take_consent(arguments, config)
    if config.train or config.task:
        rule = (
            "must be a configuration of the built-in training: compare measures accuracy, time and memory of its loop"
        )
        raise InputError(f"{arguments.best}: rank {arguments.rank}: {rule}, got {config.train or config.task}")
    consent_to(*arguments.models)
    from tune_amp.cli.comparison import compare_precisions

    return compare_precisions(arguments, command, best)
