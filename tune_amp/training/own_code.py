"""Runs a user's own code: undoes its changes to the process, and turns an exit that it calls into an error."""

import contextlib
import os
import signal
import site
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tune_amp.training.generators import keep_generators
from tune_amp.trial.config import SIGNALS
from tune_amp.trial.consent import load_function

_PLACES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), site.getusersitepackages())
NOT_OWN = ("<", *(os.path.join(place, "") for place in (str(Path(__file__).parents[1]), *_PLACES)))  # noqa: PTH118
"""Beginnings of the file names of all code but the user's own."""


def find_place(error: BaseException) -> str:
    """Return the innermost line of the user's own code in a traceback, such as `` (mine.py:12)``; empty if none is.

    A worker's traceback is kept nowhere.
    """
    tracebacks = [traceback.extract_tb(each.__traceback__) for each in (error, error.__cause__) if each is not None]
    own = [frame for frames in tracebacks for frame in frames if not frame.filename.startswith(NOT_OWN)]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def import_function(name: str) -> Callable[..., Any]:
    """Return ``consent.load_function(name)``, and restore torch's settings and all generators afterwards.

    A process runs a module on its first import only: what the module sets or draws must not affect one trial alone.

    Raises:
        InputError: as ``load_function``.
        RuntimeError: the module raises KeyboardInterrupt.
    """
    with exits_as_errors(), unchanged_process(), warnings.catch_warnings():
        return load_function(name)


@contextlib.contextmanager
def exits_as_errors() -> Iterator[None]:
    """Turn ``sys.exit`` and KeyboardInterrupt in the ``with`` block into errors of the code that runs there.

    They are not converted if the process received a signal: Ctrl-C, or the one with which Ray ends a worker.

    Raises:
        RuntimeError: the code called ``sys.exit`` or raised KeyboardInterrupt.
    """
    signals: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():  # signals interrupt only this thread
        before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        before[number](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if signals:
            raise
        what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else "raised KeyboardInterrupt"
        raise RuntimeError(f"the code {what}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Restore the generators, and torch's gradient mode and defaults, after the ``with`` block."""
    gradients, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        with keep_generators(torch.device("cpu")):
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)  # a set default slows every call
