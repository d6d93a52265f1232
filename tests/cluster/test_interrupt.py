import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from tune_amp.cluster import interrupt as halt
from tune_amp.cluster.interrupt import StopRequest, interrupted_by_signals, stopping_on_signals, watching
from tune_amp.trial.config import SIGNALS


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_asks_whoever_listens_and_the_second_leaves(number: signal.Signals) -> None:
    left = []
    stop = StopRequest(lambda: left.append(True))
    with stopping_on_signals(stop), stop.watched_by_tune():
        signal.raise_signal(number)
        assert stop.reason == number.name
        assert left == []
        signal.raise_signal(signal.SIGTERM)
    assert left == [True]
    assert stop.reason == number.name


def test_signal_that_nobody_listens_to_is_an_interrupt() -> None:
    stop = StopRequest()
    with stopping_on_signals(stop):
        with stop.watched_by_tune():
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_answers_to_signals_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopping_on_signals(StopRequest()):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_first_reason_counts() -> None:
    stop = StopRequest()
    stop.ask("the disk is full")
    stop.ask("SIGINT")
    assert stop.reason == "the disk is full"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halt, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(halt, "GRACE_SECONDS", 0.2)


def wait_for(holds: "threading.Event") -> None:
    assert holds.wait(20)


@pytest.mark.usefixtures("fast")
def test_search_is_asked_to_end_where_ray_has_died_and_left_alone_if_it_does() -> None:
    stop, asked, left = StopRequest(), threading.Event(), threading.Event()

    def find_dead() -> str | None:
        asked.set()
        return "raylet"

    with watching(stop, find_dead, left.set):
        wait_for(asked)
        while stop.reason is None:
            time.sleep(0.01)
    assert stop.reason == "Ray's raylet has died"
    time.sleep(0.3)
    assert not left.is_set()


def test_ray_that_dies_is_found_by_a_check_before_it_is_by_the_watch() -> None:
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        stop.check(lambda: "gcs_server")
    assert stop.reason == "Ray's gcs_server has died"


def test_ray_that_had_died_before_the_watch_is_found_at_once() -> None:
    stop = StopRequest()
    stop.check(lambda: None)
    with watching(stop, lambda: "raylet", lambda: None), pytest.raises(KeyboardInterrupt):
        stop.check(lambda: None)
    assert stop.reason == "Ray's raylet has died"


@pytest.mark.usefixtures("fast")
def test_process_is_left_where_the_search_cannot_end() -> None:
    left = threading.Event()
    with watching(StopRequest(), lambda: "gcs_server", left.set):
        wait_for(left)


@pytest.mark.usefixtures("fast")
def test_search_whose_ray_lives_is_not_asked() -> None:
    stop, looks = StopRequest(), []
    with watching(stop, lambda: looks.append(True), lambda: pytest.fail("left")):
        while len(looks) < 3:
            time.sleep(0.01)
    assert stop.reason is None


def test_without_a_command_the_second_signal_is_an_ordinary_ctrl_c(tmp_path: Path) -> None:
    received = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(os.getpid()))
    try:
        StopRequest().leave()
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [os.getpid()]


def test_request_can_be_pickled_whatever_its_functions_hold(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("wb", buffering=0) as journal:
        stop = StopRequest(journal.close)
        stop.ask("a full disk")
        assert vars(pickle.loads(pickle.dumps(stop))) == {"reason": "a full disk"}


def test_terminal_that_closes_may_say_so_twice() -> None:
    stop = StopRequest(lambda: pytest.fail("left"))
    with stopping_on_signals(stop), stop.watched_by_tune():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert stop.reason == "SIGHUP"


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_that_whoever_started_the_process_had_it_ignore_is_ignored(number: signal.Signals) -> None:
    """As ``nohup`` does, and a shell for what it runs in the background of a script."""
    stop = StopRequest()
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stopping_on_signals(stop), stop.watched_by_tune():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert stop.reason is None


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_interrupts_what_does_not_search_and_so_does_the_next(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with interrupted_by_signals():
        for each in (number, signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(each)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_signals_are_answered_again_where_something_else_had_begun_to() -> None:
    """As Ray does, when it starts."""
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_signals(stop), stop.watched_by_tune():
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not ours"))
        stop.reinstall_handlers()
        signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
