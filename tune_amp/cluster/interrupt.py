"""Ends a search early: on Ctrl-C, a full disk or a dead Ray. The first signal ends it cleanly, the second at once."""

import contextlib
import dataclasses
import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tune_amp.trial.config import SIGNALS

CHECK_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""Seconds that Tune may take to end its trials after a part of Ray has died."""


@dataclasses.dataclass
class StopRequest:
    """Request to end a search. Tune checks it about every tenth of a second."""

    leave: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGINT)
    """Function that ends the process at once, if nothing else can."""
    reinstall_handlers: Callable[[], object] = lambda: None
    """Function that installs the signal handlers again, after other code has replaced them."""
    reason: str | None = None
    """Reason for the request; None if there is none."""
    is_watched: bool = False
    """Whether a signal need only be recorded: Tune checks the request while trials run, or only Ray's end is left."""

    def ask(self, reason: str) -> None:
        """Request the end of the search. Keep the first reason."""
        if self.reason is None:
            self.reason = reason

    def ask_if_dead(self, find_dead: Callable[[], str | None]) -> bool:
        """Request the end if ``find_dead`` returns the name of a part of Ray that has died. Return whether it does."""
        dead = find_dead()
        if dead is not None:
            self.ask(f"Ray's {dead} has died")
        return dead is not None

    def check(self, find_dead: Callable[[], str | None]) -> None:
        """Raise KeyboardInterrupt if there is a request, or if a part of Ray has died: calls of it would not return."""
        self.ask_if_dead(find_dead)
        if self.reason is not None:
            raise KeyboardInterrupt

    def __getstate__(self) -> dict[str, str | None]:
        """Return the reason only: nothing reads Tune's pickle, and the functions only work in this process."""
        return {"reason": self.reason}

    @contextlib.contextmanager
    def watched_by_tune(self) -> Iterator[None]:
        """Mark the ``with`` block as the time in which trials run under Tune."""
        self.is_watched = True
        try:
            yield
        finally:
            self.is_watched = False


@contextlib.contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """In the ``with`` block, end the work cleanly on the first signal, and at once on the second.

    Outside of Tune's loop, a clean end is a KeyboardInterrupt. A signal that was ignored when the process started stays
    ignored, as SIGHUP does under ``nohup``.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            forget_closed_terminal()
            if stop.reason is not None:
                return  # a closing terminal sends two, one from the kernel and one from the shell
        if stop.reason is not None:
            stop.leave()
        stop.ask(signal.Signals(number).name)
        if not stop.is_watched:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def install() -> None:
        for number in handled:
            signal.signal(number, handle)

    stop.reinstall_handlers = install
    install()
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def interrupted_by_signals() -> contextlib.AbstractContextManager[None]:
    """In the ``with`` block, raise KeyboardInterrupt on each of ``SIGNALS``, as Ctrl-C does."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    return stopping_on_signals(StopRequest(interrupt))


def forget_closed_terminal() -> None:
    """Discard all further output if the terminal is gone: printing would raise an error and stop the final writes."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # not ENOTTY, which a file or a pipe raises
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


@contextlib.contextmanager
def watching(stop: StopRequest, find_dead: Callable[[], str | None], leave: Callable[[], object]) -> Iterator[None]:
    """In the ``with`` block, end the search if Ray dies, or has died before: Tune would wait for it forever.

    Args:
        stop: receives the request to end.
        find_dead: returns the name of a dead process, or None.
        leave: is called, from another thread, if the block waits for the dead process and does not check ``stop``.
    """
    over = threading.Event()

    def watch(is_dead: bool) -> None:
        while not is_dead:
            if over.wait(CHECK_SECONDS):
                return
            is_dead = stop.ask_if_dead(find_dead)
        if not over.wait(GRACE_SECONDS):
            leave()

    thread = threading.Thread(target=watch, args=(stop.ask_if_dead(find_dead),), daemon=True, name="watch-ray")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
