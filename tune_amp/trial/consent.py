"""Imports user code, and only code that the user has named: input files are not trusted."""

import argparse
import contextlib
import importlib
import importlib.machinery
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tune_amp.trial.config import InputError, is_function_name
from tune_amp.trial.text import describe_error, shown

OWN_CODE_FLAGS = ("train", "task", "model", "dataset")
"""Flags, and fields of ``TrialConfig``, that can name the user's own code."""

PICKLING_SAMPLERS = ("cmaes",)
"""Samplers that keep their state in the study as a pickle, which Optuna loads when a search is resumed."""


_SCRIPTS_FOLDER = str(Path(__file__).resolve().parents[2] / "scripts")


class _Consent:
    """The code that this process may load."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        """Names that the user gave."""
        self.is_asked_for = False
        """Whether nothing else may be loaded, as in tune_amp's commands and workers.

        Otherwise a program consents to its own code by calling ``load_function``.
        """
        self.of_files: set[str] = set()
        """Names from files, which need consent even if ``is_asked_for`` is False."""
        self.provided: dict[str, Callable[..., Any]] = {}
        """Functions and classes that this process was given as they are, because no module holds them."""


_consent = _Consent()


def consent_to(*names: str | None) -> None:
    """Record the names that the user gave on a command line or in Python: code that only a file names is never loaded.

    The record belongs to the process, and after the first call the process loads nothing else. The process that starts
    a worker sends it ``list_consented()``.
    """
    _consent.is_asked_for = True
    _consent.given.update(name for name in names if name is not None)


def name_function(function: Any) -> str:
    """Return a name by which ``load_function`` finds a function or class that the user passed in Python.

    What a module holds is found by its name. Another one, of a notebook or a script, is kept as it is:
    ``list_provided`` has it for the workers.

    Raises:
        InputError: it has no name, as a lambda, or it is not callable.
    """
    name = f"{getattr(function, '__module__', None)}:{getattr(function, '__name__', None)}"
    if not callable(function) or not is_function_name(name):
        raise InputError(f"{shown(function)}: must be a function or a class with a name")
    module = sys.modules.get(function.__module__)
    if function.__module__ != "__main__" and getattr(module, function.__name__, None) is function:
        _consent.provided.pop(name, None)
    else:
        _consent.provided[name] = function
    _consent.given.add(name)
    return name


def list_provided() -> dict[str, Callable[..., Any]]:
    """Return the functions and classes that no module holds, by name."""
    return dict(_consent.provided)


def provide(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Let ``load_function`` return these functions and classes for their names, in a worker."""
    _consent.provided.update(functions)


def distrust(name: str) -> None:
    """Record that a file contains ``name``: if it names code, loading it needs the user's consent."""
    if is_function_name(name):
        _consent.of_files.add(name)


def list_consented() -> tuple[str, ...]:
    """Return all names that the user has given so far."""
    return tuple(sorted(_consent.given))


def check_consent(place: str, **named: str) -> None:
    """Refuse code that only a file names: files are not trusted.

    Args:
        place: where the names are, for the message.
        named: flag without its dashes -> its value in the file.

    Raises:
        InputError: a value names code that the user has not named.
    """
    for flag, name in named.items():
        if name in _consent.given:
            continue
        if is_function_name(name):
            raise InputError(f"{place}: {flag}: names your own code; to run it, add --{flag} {name}")
        if name in PICKLING_SAMPLERS:
            reason = "keeps a pickle in the study, and loading a pickle can run code; to load it"
            raise InputError(f"{place}: {flag}: {name} {reason}, add --{flag} {name}")


def load_function(name: str) -> Callable[..., Any]:
    """Import and return the function ``package.module:function``; the module may be in the current folder.

    Raises:
        InputError: the user has not consented to it, or the module cannot be imported, has no such function, or hides
            a module of the same name in the current folder.
    """
    if not is_function_name(name):
        raise InputError(f"{shown(name)}: must have the form module:function")
    if name not in _consent.given and (_consent.is_asked_for or name in _consent.of_files):
        way = f"in Python, call tune_amp.trial.consent_to({name!r}) first"
        raise InputError(f"{name}: code that only a file names is not run; name it on the command line, or, {way}")
    _consent.given.add(name)
    if name in _consent.provided:
        return _consent.provided[name]
    folder = str(Path.cwd())
    # Python puts the folder of a script first on the path: tune_amp's train.py would shadow a user's.
    sys.path[:] = [entry for entry in sys.path if entry != _SCRIPTS_FOLDER]
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file there must not shadow an installed module that others import
    module_name, function_name = name.split(":")
    try:
        with _no_command_line(module_name):
            function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:  # user code may raise anything, and a script without a main guard exits
        raise InputError(f"{name}: importing {module_name} failed ({describe_error(error)})") from error
    _check_not_hidden(name, folder)
    if not callable(function):
        got = "no such name" if function is None else f"a value of type {type(function).__name__}"
        raise InputError(f"{name}: {module_name} must hold a function {function_name}, got {got}")
    return function  # type: ignore[no-any-return]  # callable() shows no signature


@contextlib.contextmanager
def _no_command_line(module_name: str) -> Iterator[None]:
    """Hide the command line in the ``with`` block: an imported module must not take its settings from it.

    Code that parses it and ignores unknown arguments (``parse_known_args``) gets its defaults, in every process.
    """
    from unittest.mock import patch  # takes 40 ms to import

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        guard = "put that below if __name__ == '__main__'"
        raise SystemExit(f"{module_name} parses the command line when imported: {guard}")

    with (
        patch.object(sys, "argv", [module_name, "--imported-by-tune-amp"]),
        patch.object(argparse.ArgumentParser, "error", refuse),  # it would print a page of usage
    ):
        yield


def _check_not_hidden(name: str, folder: str) -> None:
    """Refuse a module of the standard library, or an installed one, if a file in ``folder`` has its name.

    The file cannot be loaded instead: all code that imports the other module by that name would get the file.
    """
    top = name.partition(":")[0].partition(".")[0]
    own = importlib.machinery.PathFinder.find_spec(top, [folder])
    if own is None or own.origin is None:
        return
    imported = getattr(sys.modules[top], "__file__", None) or "built into Python"
    installed = {sysconfig.get_path(scheme) for scheme in ("stdlib", "platstdlib", "purelib", "platlib")}
    hidden = imported == "built into Python" or any(Path(imported).is_relative_to(place) for place in installed)
    if hidden and imported != own.origin:
        raise InputError(f"{name}: {top} is {imported}, not {own.origin}; rename your own file")


def list_own_code(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags that name the user's own code among ``settings`` again, as consent to run it."""
    words: list[str] = []
    for flag in OWN_CODE_FLAGS:
        name = settings.get(flag)
        if name is not None and is_function_name(name) and name not in words:
            words += [f"--{flag}", name]
    return words
