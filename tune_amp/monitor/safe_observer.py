"""Wraps an observer so that its errors cannot stop a search."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from tune_amp.trial.config import describe_error


class SafeObserver:
    """Forwards all events until the observer fails. The failure is printed once, and the search continues.

    Tune treats an exception that leaves a callback as a fault of the trial, and would train it again, three times. An
    observer can fail because the reader of a pipe is gone, or the disk of a log is full.

    Args:
        observer: a ``prometheus.SearchObserver``.
    """

    def __init__(self, observer: Any) -> None:
        self._observer: Any = observer

    def on_progress(self, progress: Any, ended: Any) -> None:
        """See ``progress.Observer``."""
        self._try(lambda observer: observer.on_progress(progress, ended))

    def on_confirmation(self, progress: Any, ended: Any) -> None:
        """See ``progress.ConfirmObserver``."""
        self._try(lambda observer: observer.on_confirmation(progress, ended))

    def _try(self, send: Callable[[Any], None]) -> None:
        if self._observer is None:
            return
        try:
            send(self._observer)
        except BrokenPipeError:  # the reader is gone
            self._observer = None
        except Exception as error:
            self._observer = None
            with contextlib.suppress(OSError):
                text = f"the search continues, but is no longer shown: {describe_error(error)}"
                print(text, file=sys.stderr)  # noqa: T201
