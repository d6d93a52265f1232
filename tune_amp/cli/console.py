"""What the commands share: one-line errors, exit codes, sentences, and the data set with what its loader has to say.

The commands import torch, Ray and Optuna inside their functions: ``--help`` and a mistyped flag answer at once.
"""

import argparse
import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from rich.console import Console

from tune_amp.results.run_files import BEST_FILE, JOURNAL_FILE, TRIALS_FILE
from tune_amp.trial.config import InputError, TrialConfig, describe_error, one_line
from tune_amp.trial.consent import check_consent, consent_to
from tune_amp.trial.text import printable

if TYPE_CHECKING:
    import torch

    from tune_amp.training.data import Dataset

MOST_CHARACTERS = 2_000
"""Of the line that refuses an input, which may name paths."""
EXIT_DONE, EXIT_NO_RESULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line, like every other wrong input, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments."""
        if message.endswith("expected one argument"):
            flag = message.split()[1].rstrip(":")
            message += f"; one that begins with - is joined by =, as in {flag}=-x"
        raise InputError(f"{one_line(message)} (see {self.prog} --help)")


def read_path(text: str) -> Path:
    """Return the path that an argument names, ``~`` expanded: a shell leaves it in ``--output=~/x``."""
    return Path(read_place(text))


def read_place(text: str) -> str:
    """Return an argument that may be a path or a name; see ``read_path``.

    Raises:
        ArgumentTypeError: it is empty, or nobody knows the home folder that it begins with.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    expanded = os.path.expanduser(text)  # noqa: PTH111  # as a Path, "./name" would become a name
    if expanded.startswith("~"):
        rule = f"names an unknown home folder; set HOME, give the full path, or write ./{text} for that very name"
        raise argparse.ArgumentTypeError(f"{text} {rule}")
    return expanded


def answer_bad_input(command: Callable[[], int]) -> int:
    """Run ``command``; answer an input that it refuses with one line and exit code 2."""
    mend_streams()
    try:
        return command()
    except InputError as error:
        message, code = f"error: {one_line(str(error), limit=MOST_CHARACTERS)}", EXIT_BAD_INPUT
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # whatever was to be read or written, its path came from the user
            raise
        message, code = f"error: {describe_error(error)}", EXIT_BAD_INPUT
    except KeyboardInterrupt:
        message, code = "interrupted", EXIT_INTERRUPTED
    with contextlib.suppress(OSError):  # nobody reads it
        print(message, file=sys.stderr)  # noqa: T201
    return code


SPELLINGS = {"±": "+-", "…": "..."}
"""What is printed in place of a character that the encoding of a stream does not have; of any other, ``?``."""


def mend_streams() -> None:
    """Make standard output and standard error take every text, closed ones (``>&-``) by dropping it."""
    # A closed descriptor would become that of the next file opened, and receive what libraries print.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    codecs.register_error("tune_amp.spell", _spell)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # it stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tune_amp.spell")


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no text: printed as it is
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return SPELLINGS.get(character, "?"), error.start + 1


class LastingConsole(Console):
    """Goes on where the reader of a pipe is gone (``| head``): rich would end the process, and a search with it."""

    def on_broken_pipe(self) -> None:
        """Print into the void from now on: the files are what counts."""
        self.quiet = True
        _print_into_the_void(self.file)


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console for prose, in which numbers are not coloured."""
    return LastingConsole(stderr=stderr, quiet=quiet, highlight=False)


def _print_into_the_void(stream: IO[str]) -> None:
    with Path(os.devnull).open("wb") as nowhere:  # or Python complains on its exit
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def ignoring_closed_pipe() -> Iterator[None]:
    """Where standard output cannot be written, print into the void: the files are what counts.

    The reader of a pipe is gone (``| head``), or the terminal, or the disk of a log is full.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError:
        _print_into_the_void(sys.stdout)


def show_cursor() -> None:
    """Give a terminal its cursor back, which a live table hides, where the process leaves without ending the table."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # not through its buffer, in whose write a signal may have come


def say(console: Console, prose: str, style: str | None = None) -> None:
    """Print a sentence: wrapped between words in a terminal, on one line in a log. See :func:`printable`."""
    console.print(printable(prose), style=style, markup=False, soft_wrap=not is_screen(console))


def is_screen(console: Console) -> bool:
    """Return whether a terminal shows it. To rich, ``FORCE_COLOR``, which asks for colour, makes a log one too."""
    return console.is_interactive and console.file.isatty()


def name_beside(best: Path, name: str) -> Path:
    """The folder ``name`` beside a run's file, or in its folder, for what a command writes where nobody said.

    Raises:
        InputError: it is a link: in a run that somebody else packed, it may lead anywhere.
    """
    folder = (best if best.is_dir() else best.parent) / name
    if folder.is_symlink():
        raise InputError(f"--output: {folder} is a link, which may lead anywhere; choose another folder")
    return folder


def load_announced(name: str, data_dir: Path | None) -> "Dataset":
    """The data set, and loudly what its loader has to say."""
    from tune_amp.training.data import load_dataset

    dataset = load_dataset(name, data_dir)
    if dataset.notice:
        say(open_console(stderr=True), f"NOTE: {dataset.notice}", style="bold yellow")
    return dataset


def take_consent(arguments: argparse.Namespace, config: TrialConfig) -> None:
    """Take the flags as consent to the code that they name, and refuse a file that names other code.

    Args:
        arguments: ``best``, the file; ``model`` and ``dataset``, the flags.
        config: read from the file.

    Raises:
        InputError: a flag is missing, or names something else.
    """
    for flag, named in (("model", config.model), ("dataset", config.dataset)):
        given = getattr(arguments, flag)
        if given is not None and given != named:
            raise InputError(f"--{flag}: must be {named}, which {arguments.best} was searched with, got {given}")
    consent_to(arguments.model, arguments.dataset)
    check_consent(str(arguments.best), model=config.model, dataset=config.dataset)


def load_searched_data(name: str, data_dir: Path | None, data_hash: str) -> "Dataset":
    """The data set ``name``, which must be the very data of the search.

    Raises:
        InputError: it has another hash than ``data_hash``.
    """
    dataset = load_announced(name, data_dir)
    check_same_data(dataset, data_hash)
    return dataset


def check_same_data(dataset: "Dataset", data_hash: str) -> None:
    """Raise InputError where the data set has another hash than ``data_hash``."""
    if dataset.content_hash != data_hash:
        raise InputError(
            f"--data-dir: must hold the data that the search used (sha256 {data_hash[:12]}...), "
            f"got other {dataset.name} data (sha256 {dataset.content_hash[:12]}...)"
        )


def find_run(run: str, results_dir: Path) -> Path:
    """What ``run`` names as a path, or by its name in ``results_dir``: a run's folder before a file or another folder.

    Where there is nothing of this name, the path is returned for what reads it to refuse.
    """
    places = (Path(run), results_dir / run)
    with contextlib.suppress(OSError):  # a name that is too long for a file
        for is_meant in (_is_run, Path.is_file, Path.is_dir):
            for place in places:
                if is_meant(place):
                    return place
    return Path(run)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (JOURNAL_FILE, TRIALS_FILE, BEST_FILE))


def find_run_folder(run: str, results_dir: Path, flag: str) -> Path:
    """The folder of what ``find_run`` finds.

    Raises:
        InputError: there is none; the message names ``flag``.
    """
    place = find_run(run, results_dir)
    with contextlib.suppress(OSError):
        if place.exists():
            return place.parent if place.is_file() else place
    raise InputError(f"{flag}: must be the folder of a run, or its name in {results_dir}, got {run}")


def choose_device(name: str) -> "torch.device":
    """The device of ``--device``: auto, cpu or cuda.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device: cuda is not available on this machine")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
