from typing import Any

import pytest

from tune_amp.monitor.safe_observer import SafeObserver


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.seen: list[Any] = []

    def on_progress(self, progress: Any, ended: Any) -> None:
        self.seen.append((progress, ended))
        if progress == "fails":
            raise self.error

    def on_confirmation(self, progress: Any, ended: Any) -> None:
        self.on_progress(progress, ended)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(), ""),  # the reader has gone
        (
            OSError(28, "No space left on device"),
            "the search continues, but is no longer shown: OSError: [Errno 28] No space left on device\n",
        ),
        (KeyError("oh"), "the search continues, but is no longer shown: KeyError: 'oh'\n"),
    ],
)
def test_observer_that_fails_gets_no_more_events_and_does_not_stop_the_search(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = Failing(error)
    safe = SafeObserver(observer)
    safe.on_progress("first", None)
    safe.on_confirmation("fails", "run")
    safe.on_progress("fails", None)
    assert observer.seen == [("first", None), ("fails", "run")]
    assert capsys.readouterr().err == said


def test_ctrl_c_in_an_observer_is_not_taken_for_its_failure() -> None:
    safe = SafeObserver(Failing(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        safe.on_progress("fails", None)
