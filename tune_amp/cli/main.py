"""The program ``tune-amp``: search, train, compare, report, show, grafana."""

import sys
from collections.abc import Sequence

from tune_amp import __version__
from tune_amp.cli.compare import compare_command
from tune_amp.cli.console import EXIT_BAD_INPUT, EXIT_DONE
from tune_amp.cli.grafana import grafana_command
from tune_amp.cli.report import report_command
from tune_amp.cli.search import search_command
from tune_amp.cli.show import show_command
from tune_amp.cli.train import train_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of ``tune-amp``: search, train, compare, report, show, or grafana.

    Returns:
        The exit code: 0 done, 1 no result, 2 bad input, 130 interrupted.
    """
    commands = {
        "search": search_command,
        "train": train_command,
        "compare": compare_command,
        "report": report_command,
        "show": show_command,
        "grafana": grafana_command,
    }
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in commands:
        name = arguments[0]
        return commands[name](arguments[1:], program=f"tune-amp {name}")
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"tune-amp {__version__}")  # noqa: T201
        return EXIT_DONE
    usage = f"usage: tune-amp {{{','.join(commands)}}} ... (each has its own --help); tune-amp --version"
    wanted_help = bool(arguments) and arguments[0] in ("-h", "--help")
    print(usage, file=sys.stdout if wanted_help else sys.stderr)
    return EXIT_DONE if wanted_help else EXIT_BAD_INPUT
