from typing import Any

import pytest

from tune_amp.monitor.safe_observer import Untroubled


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
        (BrokenPipeError(), ""),  # the reader has gone, and wants to hear nothing
        (
            OSError(28, "No space left on device"),
            "the search is shown no longer, and goes on: OSError: [Errno 28] No space left on device\n",
        ),
        (KeyError("oh"), "the search is shown no longer, and goes on: KeyError: 'oh'\n"),
    ],
)
def test_observer_that_fails_is_told_nothing_more_and_harms_nobody(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = Failing(error)
    untroubled = Untroubled(observer)
    untroubled.on_progress("first", None)
    untroubled.on_confirmation("fails", "run")
    untroubled.on_progress("fails", None)
    assert observer.seen == [("first", None), ("fails", "run")]
    assert capsys.readouterr().err == said


def test_ctrl_c_in_an_observer_is_not_its_fault() -> None:
    untroubled = Untroubled(Failing(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        untroubled.on_progress("fails", None)
