"""What the commands share: one-line errors, exit codes, sentences, and the data set with what its loader has to say.

The commands import torch, Ray and Optuna inside their functions: ``--help`` and a mistyped flag answer at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from tune_amp.config import InputError

if TYPE_CHECKING:
    from tune_amp.data import Dataset

EXIT_DONE, EXIT_NO_RESULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line, like every other wrong input, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments."""
        raise InputError(f"{message} (see {self.prog} --help)")


def answer_bad_input(command: Callable[[], int]) -> int:
    """Run ``command``; answer an input that it refuses with one line and exit code 2."""
    try:
        return command()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def ignoring_closed_pipe() -> Iterator[None]:
    """Where the reader of standard output is gone (``| head``), print into the void: the files are what counts."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on its exit


def say(console: Console, prose: str, style: str | None = None) -> None:
    """Print a sentence: wrapped between words in a terminal, on one line in a log."""
    console.print(prose, style=style, markup=False, soft_wrap=not console.is_terminal)


def load_announced(name: str, data_dir: Path | None) -> "Dataset":
    """The data set, and loudly what its loader has to say."""
    from tune_amp.data import load_dataset

    dataset = load_dataset(name, data_dir)
    if dataset.notice:
        say(Console(stderr=True, highlight=False), f"NOTE: {dataset.notice}", style="bold yellow")
    return dataset
