"""The command ``tune-amp grafana``: the bundled Grafana dashboard of the metrics in ``gauges``."""

import argparse
import importlib.resources
from collections.abc import Sequence

from tune_amp.cli.console import EXIT_DONE, OneLineParser, answer_bad_input, ignoring_closed_pipe, read_path
from tune_amp.results.files import write_atomically
from tune_amp.trial.config import InputError


def grafana_command(arguments: Sequence[str] | None = None, program: str = "tune-amp grafana") -> int:
    """Print or write the dashboard that Grafana imports. Return the exit code."""
    return answer_bad_input(lambda: _grafana(_grafana_parser(program).parse_args(arguments)))


def read_dashboard() -> str:
    """Return the dashboard, ``tune_amp/monitor/grafana/tune_amp.json`` in the package."""
    file = importlib.resources.files("tune_amp.monitor") / "grafana" / "tune_amp.json"
    return file.read_text(encoding="utf-8")


def _grafana_parser(program: str) -> argparse.ArgumentParser:
    parser = OneLineParser(program, "The Grafana dashboard of a search's metrics, as JSON that Grafana imports.")
    parser.add_argument("file", metavar="FILE", nargs="?", type=read_path, help="where to write it (standard output)")
    return parser


def _grafana(arguments: argparse.Namespace) -> int:
    text = read_dashboard()
    if arguments.file is None:
        with ignoring_closed_pipe():
            print(text, end="")  # noqa: T201
        return EXIT_DONE
    content = text.encode()
    try:  # an edited dashboard is never replaced: it is the user's file
        if not (arguments.file.is_file() and arguments.file.read_bytes() == content):
            write_atomically(arguments.file, lambda file: file.write(content), replace=False)
    except FileExistsError:
        rule = "already exists and is another file: remove it, or name another"
        raise InputError(f"FILE: {arguments.file} {rule}") from None
    except OSError as error:
        raise InputError(f"FILE: {arguments.file} cannot be written: {error.strerror}") from error
    return EXIT_DONE
