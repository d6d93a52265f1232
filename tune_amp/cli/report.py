"""The command ``tune-amp report``, which ``scripts/report.py`` runs too: arguments, the call and printing."""

import argparse
from collections.abc import Sequence

from tune_amp.cli.console import (
    EXIT_DONE,
    OneLineParser,
    add_run_argument,
    answer_bad_input,
    find_run_folder,
    ignoring_closed_pipe,
    read_path,
)


def report_command(arguments: Sequence[str] | None = None, program: str = "scripts/report.py") -> int:
    """Write the report of a run again and print its path. Return the exit code."""
    return answer_bad_input(lambda: _report(_report_parser(program).parse_args(arguments)))


def _report_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        program, "Make the report of a run from its Parquet files: one HTML file that needs no network."
    )
    add_run_argument(parser, "run", "name or folder of the run, or a file in it")
    parser.add_argument("--output", type=read_path, metavar="FILE", help="where to write it (report.html in RUN)")
    return parser


def _report(arguments: argparse.Namespace) -> int:
    from tune_amp.report.report import write_report

    folder = find_run_folder(arguments.run, arguments.results_dir, "RUN")
    path = write_report(folder, arguments.output)
    with ignoring_closed_pipe():
        print(path)  # noqa: T201
    return EXIT_DONE
