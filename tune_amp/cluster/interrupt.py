"""Ends a search before its trials do: at Ctrl-C, at a full disk, when Ray has died. Once cleanly, twice at once."""

import contextlib
import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tune_amp.trial.config import SIGNALS

LOOK_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""How long Tune may take to end its trials where a part of Ray has died."""


class StopRequest:
    """Asks a search to end. Tune looks at it about every tenth of a second."""

    def __init__(self, leave: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGINT)) -> None:
        self.leave = leave
        """Ends the process at once, where nothing else can."""
        self.heed: Callable[[], object] = lambda: None
        """Answers signals again, where something else has begun to answer them."""
        self.reason: str | None = None
        """Why the search was asked to end, or None."""
        self.is_heard = False
        """Whether someone looks at it: Tune, while trials run."""

    def ask(self, reason: str) -> None:
        """Ask; the first reason counts."""
        if self.reason is None:
            self.reason = reason

    def __getstate__(self) -> dict[str, str | None]:
        """Tune pickles whatever may end its trials, for nobody to read: the functions are this process's own."""
        return {"reason": self.reason}

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """In the ``with`` block, trials run under Tune."""
        self.is_heard = True
        try:
            yield
        finally:
            self.is_heard = False


@contextlib.contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """In the ``with`` block, the first signal ends cleanly what runs, and the second at once.

    Outside of Tune's loop, ending cleanly is a KeyboardInterrupt. A signal that the process was started to ignore, as
    ``nohup`` has it for the end of the terminal, is ignored.
    """

    def answer(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            forget_closed_terminal()
            if stop.reason is not None:
                return  # of a terminal that closes there come two, one from the kernel and one from the shell
        if stop.reason is not None:
            stop.leave()
        stop.ask(signal.Signals(number).name)
        if not stop.is_heard:
            raise KeyboardInterrupt

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def heed() -> None:
        for number in heeded:
            signal.signal(number, answer)

    before = [signal.getsignal(number) for number in heeded]
    stop.heed = heed
    heed()
    try:
        yield
    finally:
        for number, handler in zip(heeded, before, strict=True):
            signal.signal(number, handler)


def interrupted_by_signals() -> contextlib.AbstractContextManager[None]:
    """In the ``with`` block, each of ``SIGNALS`` raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    return stopping_on_signals(StopRequest(interrupt))


def forget_closed_terminal() -> None:
    """Print nowhere from now on if the terminal is gone: each line would be an error, and end what is to be written."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # not ENOTTY, which a file or a pipe says
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


@contextlib.contextmanager
def watching(stop: StopRequest, find_dead: Callable[[], str | None], leave: Callable[[], object]) -> Iterator[None]:
    """In the ``with`` block, end the search where Ray has died: Tune would wait for it for ever.

    Args:
        stop: is asked.
        find_dead: names what has died.
        leave: is called, from another thread, where Tune itself waits for what has died and cannot be asked.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            dead = find_dead()
            if dead is not None:
                stop.ask(f"Ray's {dead} has died")
                if not over.wait(GRACE_SECONDS):
                    leave()
                return

    thread = threading.Thread(target=watch, daemon=True, name="watch-ray")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
