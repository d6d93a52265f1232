"""Shared by the commands: one-line errors, exit codes, printing, and loading the data set with its loader's notice.

The commands import torch, Ray and Optuna inside their functions, so that ``--help`` and a mistyped flag return at
once.
"""

import argparse
import atexit
import codecs
import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from tune_amp.cluster.interrupt import interrupted_by_signals
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.options import DEFAULT_RESULTS_DIR
from tune_amp.trial.config import InputError, TrialConfig, is_function_name
from tune_amp.trial.consent import OWN_CODE_FLAGS, check_consent, consent_to, list_consented
from tune_amp.trial.text import describe_error, one_line, printable

if TYPE_CHECKING:
    import torch

    from tune_amp.training.data import Dataset

MOST_CHARACTERS = 2_000
"""Longest error line for a bad input, in characters; it may name paths."""
EXIT_DONE, EXIT_NO_RESULT, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like those of all other bad input, not a page of usage."""

    def __init__(self, prog: str, description: str | None = None, **more: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        """Raise the parser's message as InputError."""
        if message.endswith("expected one argument"):
            flag = message.split()[1].rstrip(":")
            message += f"; one that begins with - is joined by =, as in {flag}=-x"
        raise InputError(f"{one_line(message)} (see {self.prog} --help)")


def read_path(text: str) -> Path:
    """Return the path that an argument names, with ``~`` expanded: a shell does not expand it in ``--output=~/x``."""
    return Path(read_place(text))


def read_place(text: str) -> str:
    """Return an argument that may be a path or a name; see ``read_path``.

    Raises:
        ArgumentTypeError: it is empty, or begins with an unknown home folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    expanded = os.path.expanduser(text)  # noqa: PTH111  # as a Path, "./name" would become a name
    if expanded.startswith("~"):
        rule = f"names an unknown home folder; set HOME, give the full path, or write ./{text} for that very name"
        raise argparse.ArgumentTypeError(f"{text} {rule}")
    return expanded


def leave(code: int) -> NoReturn:
    """End the process with an exit code; after a search, without looking at every object of PyTorch and Ray once more.

    That takes 1.1 s. What is registered for the end still runs, as in a process of ``multiprocessing``. It is not left
    out if the user's own code ran here: files that it did not close are written then.
    """
    if "ray" not in sys.modules or any(map(is_function_name, list_consented())):
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - waits for threads
    atexit._run_exitfuncs()  # noqa: SLF001
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (BrokenPipeError, ValueError):  # it has no reader, or is closed
            pass
        except OSError:  # a full disk
            code = code or EXIT_NO_RESULT
    os._exit(code)


def answer_bad_input(command: Callable[[], int]) -> int:
    """Run ``command``. If it refuses an input, print one line and return exit code 2."""
    mend_streams()
    try:
        return command()
    except InputError as error:
        message, code = f"error: {one_line(str(error), limit=MOST_CHARACTERS)}", EXIT_BAD_INPUT
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a path that long came from the user
            raise
        message, code = f"error: {describe_error(error)}", EXIT_BAD_INPUT
    except KeyboardInterrupt:
        message, code = "interrupted", EXIT_INTERRUPTED
    complain(message)
    return code


def complain(line: str) -> None:
    """Print a line on standard error, if it has a reader."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)  # noqa: T201


SPELLINGS = {"±": "+-", "…": "..."}
"""Replacements for characters that a stream's encoding lacks; all others become ``?``."""


def mend_streams() -> None:
    """Make standard output and standard error accept every text; closed ones (``>&-``) drop it."""
    # The next file opened would take the number of a closed descriptor, and receive what libraries print.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    codecs.register_error("tune_amp.spell", _spell)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tune_amp.spell")


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # an undecodable byte of a file name: printed unchanged
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return SPELLINGS.get(character, "?"), error.start + 1


class LastingConsole(Console):
    """A console that survives a closed pipe (``| head``): rich would end the process, and with it a search."""

    def on_broken_pipe(self) -> None:
        """Discard all further output: the files are what counts."""
        self.quiet = True
        _print_into_the_void(self.file)


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console for prose, in which numbers are not coloured, and ``:train:`` is no picture of one."""
    return LastingConsole(stderr=stderr, quiet=quiet, highlight=False, emoji=False)


def _print_into_the_void(stream: IO[str]) -> None:
    with Path(os.devnull).open("wb") as nowhere:  # otherwise Python complains when it exits
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def ignoring_closed_pipe(stream: IO[str] | None = None) -> Iterator[None]:
    """Discard output if a stream, by default standard output, cannot be written: the files are what counts.

    The reader of a pipe (``| head``) or the terminal is gone, or the disk of a log is full.
    """
    try:
        yield
        (stream or sys.stdout).flush()
    except OSError:
        _print_into_the_void(stream or sys.stdout)


def show_cursor() -> None:
    """Show the terminal's cursor again: a live table hides it, and the process may exit without ending the table."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # unbuffered: a signal may have come in a buffered write


def say(console: Console, prose: str, style: str | None = None) -> None:
    """Print a sentence, wrapped between words in a terminal, on one line in a log. See :func:`printable`."""
    console.print(printable(prose), style=style, markup=False, soft_wrap=not is_screen(console))


def is_screen(console: Console) -> bool:
    """Return whether the console is a terminal. rich also takes a log for one if ``FORCE_COLOR`` asks for colour."""
    return console.is_interactive and console.file.isatty()


def add_winner_arguments(parser: argparse.ArgumentParser, saved: str) -> None:
    """Add the arguments of a command that trains a ranked configuration; ``saved`` is what ``--output`` receives."""
    add = parser.add_argument
    add_run_argument(parser, "best", "name or folder of the run, or its best.parquet")
    add("--rank", type=int, default=1, metavar="N", help="which of the ranked configurations (%(default)s)")
    add("--output", type=read_path, metavar="DIR", help=f"folder for {saved} in the run's folder)")
    add("--data-dir", type=read_path, metavar="DIR", help="folder of the data files, or TUNE_AMP_DATA")
    for flag in OWN_CODE_FLAGS:
        add(f"--{flag}", metavar="MODULE:NAME", help=f"consent to run your own code that the file names as {flag}")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train (%(default)s)")


def add_run_argument(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add the argument ``name``, which names a run, and ``--results-dir``, where it is found by its name."""
    parser.add_argument(name, type=read_place, metavar="RUN", help=text)
    parser.add_argument(
        "--results-dir",
        type=read_path,
        default=DEFAULT_RESULTS_DIR,
        metavar="DIR",
        help="where run folders are (%(default)s)",
    )


def run_winner_command(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, command: Callable[[argparse.Namespace], int]
) -> int:
    """Run a command that trains a ranked configuration, with ``best`` as a path, until a signal comes."""

    def run() -> int:
        with interrupted_by_signals():
            arguments = parser.parse_args(words)
            arguments.best = find_run(arguments.best, arguments.results_dir)
            return command(arguments)

    return answer_bad_input(run)


def choose_output(arguments: argparse.Namespace, name: str) -> Path:
    """Return ``--output``, or else the folder ``name`` beside the run's file, or in the run's folder.

    Raises:
        InputError: the default folder is a link, which in a copied run may lead anywhere.
    """
    if arguments.output is not None:
        return Path(arguments.output)
    folder: Path = (arguments.best if arguments.best.is_dir() else arguments.best.parent) / name
    if folder.is_symlink():
        raise InputError(f"--output: {folder} is a link, which may lead anywhere; choose another folder")
    return folder


def load_announced(name: str, data_dir: Path | None, *, task: str | None = None, train: str | None = None) -> "Dataset":
    """Return the data of ``runs.load_data``, and print its loader's notice on standard error."""
    from tune_amp.training.runs import load_data

    dataset = load_data(name, data_dir, task=task, train=train)
    if dataset.notice:
        say(open_console(stderr=True), f"NOTE: {dataset.notice}", style="bold yellow")
    return dataset


def take_consent(arguments: argparse.Namespace, config: TrialConfig) -> None:
    """Accept the flags as consent to the code that they name, and refuse a file that names other code.

    Args:
        arguments: ``best`` is the file; the flags are ``consent.OWN_CODE_FLAGS``.
        config: read from the file.

    Raises:
        InputError: a flag is missing, or names other code.
    """
    for flag in OWN_CODE_FLAGS:
        given, named = getattr(arguments, flag), getattr(config, flag)
        if given is not None and given != named:
            raise InputError(f"--{flag}: must be {named}, which {arguments.best} was searched with, got {given}")
    consent_to(*(getattr(arguments, flag) for flag in OWN_CODE_FLAGS))
    check_consent(str(arguments.best), **{flag: getattr(config, flag) or "" for flag in OWN_CODE_FLAGS})


def load_searched_data(config: TrialConfig, data_dir: Path | None, data_hash: str) -> "Dataset":
    """Return the data of a configuration, which must be the same as in the search.

    Raises:
        InputError: its hash is not ``data_hash``.
    """
    dataset = load_announced(config.dataset, data_dir, task=config.task, train=config.train)
    check_same_data(dataset, data_hash)
    return dataset


def check_same_data(dataset: "Dataset", data_hash: str) -> None:
    """Raise InputError if the data set's hash is not ``data_hash``."""
    if dataset.content_hash != data_hash:
        raise InputError(
            f"--data-dir: must hold the data that the search used (sha256 {data_hash[:12]}...), "
            f"got other {dataset.name} data (sha256 {dataset.content_hash[:12]}...)"
        )


def find_run(run: str, results_dir: Path) -> Path:
    """Return the path that ``run`` names, either as a path or as a name in ``results_dir``.

    A run's folder is preferred to a file, and a file to another folder. If nothing has this name, ``run`` is returned
    as a path, so that its reader refuses it.
    """
    places = (Path(run), results_dir / run)
    with contextlib.suppress(OSError):  # a name too long for a file
        for is_meant in (_is_run, Path.is_file, Path.is_dir):
            for place in places:
                if is_meant(place):
                    return place
    return Path(run)


def _is_run(folder: Path) -> bool:
    run = RunFolder(folder)
    return any(path.is_file() for path in (run.journal, run.trials, run.best))


def find_run_folder(run: str, results_dir: Path, flag: str) -> Path:
    """Return the folder of the path that ``find_run`` finds: a run's folder or a file in it, or any other folder.

    Raises:
        InputError: there is no such path; the message names ``flag``.
    """
    place = find_run(run, results_dir)
    with contextlib.suppress(OSError):
        if place.is_dir():
            return place
        if place.is_file() and _is_run(place.parent):
            return place.parent
    raise InputError(f"{flag}: must be the folder of a run, or its name in {results_dir}, got {run}")


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """In the ``with`` block, torch uses ``count`` CPU threads; afterwards as many as before, as in a notebook."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(name: str) -> "torch.device":
    """Return the device of ``--device``: auto, cpu or cuda.

    Raises:
        InputError: ``name`` is cuda, and CUDA is not available.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device: cuda is not available on this machine")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
