"""The command ``tune-amp show``: prints a run again, from the run's files alone."""

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from tune_amp.cli.console import (
    EXIT_DONE,
    OneLineParser,
    add_run_argument,
    answer_bad_input,
    find_run_folder,
    ignoring_closed_pipe,
    open_console,
    say,
)
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.options import name_path
from tune_amp.trial.config import check
from tune_amp.trial.consent import list_own_code

if TYPE_CHECKING:
    from tune_amp.cli.run_summary import RunSummary


def show_command(arguments: Sequence[str] | None = None, program: str = "tune-amp show") -> int:
    """Print a run again: what was searched, the data, and the result. Return the exit code."""
    return answer_bad_input(lambda: _show(_show_parser(program).parse_args(arguments)))


def _show_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(program, "Print a run again, finished or not, from its Parquet files alone.")
    add = parser.add_argument
    add_run_argument(parser, "run", "name or folder of the run, or a file in it")
    add("--top-k", type=int, metavar="N", help="how many of the best to show (as many as the search ranked)")
    return parser


def _show(arguments: argparse.Namespace) -> int:
    from tune_amp.cli.run_summary import load_summary, print_summary

    check("--top-k", arguments.top_k, arguments.top_k is None or arguments.top_k >= 1, "must be at least 1")
    summary = load_summary(find_run_folder(arguments.run, arguments.results_dir, "RUN"), arguments.top_k)
    console = open_console()
    with ignoring_closed_pipe():
        _print_start(console, summary)
        print_summary(console, summary, _describe_reuse(summary), errors=console)
    return EXIT_DONE


def _print_start(console: Console, summary: "RunSummary") -> None:
    from tune_amp.space.space import parse_space

    about, config = summary.provenance, summary.trials[0].config if summary.trials else None  # all trials share these
    tail = f" (long tail {config.imbalance:g}:1)" if config and config.imbalance != 1 else ""
    sizes = f"{about.train_images:,} training{tail} and {about.validation_images:,} validation images"
    subject = f"{config.model} on {about.dataset}" if config else about.dataset  # no trial has begun
    say(console, f"{subject}: {sizes}" if about.train_images else f"{about.dataset}: your own training loop and data")
    space = parse_space(about.space_source, about.space_text)
    say(console, f"space      {space.source}: {', '.join(parameter.name for parameter in space.parameters)}")
    say(console, f"searched   {about.objective} by {about.sampler} and {about.scheduler}, seed {about.seed}")
    say(console, f"run        {about.run}, {about.created}, on {about.device}")


def _describe_reuse(summary: "RunSummary") -> str:
    """Return the search's reuse command, but with ``tune-amp``: the folder of the scripts is not known here."""
    from tune_amp.results.provenance import list_reuse_words

    about = summary.provenance
    own_code = list_own_code(vars(summary.trials[0].config)) if summary.trials else []
    best = name_path(RunFolder(summary.folder).best)
    train = ("tune-amp", "train")
    return shlex.join(list_reuse_words(train, best, data_dir=about.data_dir, own_code=own_code))
