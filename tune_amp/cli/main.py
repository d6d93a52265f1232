"""The program ``tune-amp``: search, show, report, train, compare, grafana, completion."""

import difflib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tune_amp import __version__
from tune_amp.cli.compare import compare_command
from tune_amp.cli.completion import completion_command
from tune_amp.cli.console import EXIT_BAD_INPUT, EXIT_DONE, complain, ignoring_closed_pipe, leave
from tune_amp.cli.grafana import grafana_command
from tune_amp.cli.report import report_command
from tune_amp.cli.search import search_command
from tune_amp.cli.show import show_command
from tune_amp.cli.train import train_command
from tune_amp.trial.text import shown

COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "search": (search_command, "search for the best settings, and confirm the winners on fresh seeds"),
    "show": (show_command, "print the result of a run again"),
    "report": (report_command, "write the HTML report of a run again"),
    "train": (train_command, "train a winner on all training data, test it once and save it"),
    "compare": (compare_command, "train a winner in fp32, bf16 and fp16, and say what each gains"),
    "grafana": (grafana_command, "write the Grafana dashboard of the metrics of searches"),
}


COMMANDS["completion"] = (
    functools.partial(completion_command, commands={name: function for name, (function, _) in COMMANDS.items()}),
    "print the completion of commands, flags and runs for bash and zsh",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of ``tune-amp``.

    Returns:
        The exit code: 0 done, 1 no result, 2 bad input, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return COMMANDS[name][0](arguments[1:], program=f"tune-amp {name}")
    if name in ("-V", "--version"):
        with ignoring_closed_pipe():
            print(f"tune-amp {__version__}")  # noqa: T201
        return EXIT_DONE
    if name in ("", "-h", "--help"):
        lines = "".join(f"  {command:<12}{line}\n" for command, (_, line) in COMMANDS.items())
        usage = f"usage: tune-amp COMMAND ... (each has its own --help); tune-amp --version\n\ncommands:\n{lines}"
        stream = sys.stdout if name else sys.stderr
        with ignoring_closed_pipe(stream):
            print(usage, end="", file=stream)
        return EXIT_DONE if name else EXIT_BAD_INPUT
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    complain(f"error: {shown(name)} is not a command{hint} (known: {', '.join(COMMANDS)})")
    return EXIT_BAD_INPUT


def run() -> NoReturn:
    """Run a command of ``tune-amp``, and end the process."""
    leave(main())
