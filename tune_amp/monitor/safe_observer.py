"""An observer that cannot harm what it watches."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from tune_amp.trial.config import describe_error


class Untroubled:
    """Passes on all that it is told, until the observer fails: that is said once, and whatever it watched goes on.

    What leaves a callback of Tune's counts as a fault of the trial, which would be trained again, three times. The
    reader of a pipe may be gone, or the disk of a log be full.

    Args:
        observer: a ``gauges.SearchObserver``.
    """

    def __init__(self, observer: Any) -> None:
        self._observer: Any = observer

    def on_progress(self, progress: Any, ended: Any) -> None:
        """See ``recorder.Observer``."""
        self._try(lambda observer: observer.on_progress(progress, ended))

    def on_confirmation(self, progress: Any, ended: Any) -> None:
        """See ``confirm.ConfirmObserver``."""
        self._try(lambda observer: observer.on_confirmation(progress, ended))

    def _try(self, tell: Callable[[Any], None]) -> None:
        if self._observer is None:
            return
        try:
            tell(self._observer)
        except BrokenPipeError:  # whoever watched is gone
            self._observer = None
        except Exception as error:
            self._observer = None
            with contextlib.suppress(OSError):
                text = f"the search is shown no longer, and goes on: {describe_error(error)}"
                print(text, file=sys.stderr)  # noqa: T201
