import types
from typing import Any

import pytest

from tune_amp.search.time_limit import LOOK_SECONDS, TimeLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_trial(trial_id: str) -> Any:
    state = types.SimpleNamespace(ray_actor=f"worker of {trial_id}")
    return types.SimpleNamespace(trial_id=trial_id, max_failures=2, temporary_state=state, error_file=None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def killed() -> list[str]:
    return []


@pytest.fixture
def limit(clock: Clock, killed: list[str]) -> TimeLimit:
    return TimeLimit(60.0, kill=killed.append, clock=clock)


def look(limit: TimeLimit, clock: Clock, now: float) -> None:
    clock.now = now
    limit.on_step_end(0, [])


def test_worker_of_a_trial_that_takes_too_long_is_killed_once_and_for_good(
    limit: TimeLimit, clock: Clock, killed: list[str]
) -> None:
    slow, late = make_trial("slow"), make_trial("late")
    limit.on_trial_start(0, [], slow)
    clock.now = 30
    limit.on_trial_start(0, [], late)
    look(limit, clock, 59)
    assert killed == []
    look(limit, clock, 61)
    look(limit, clock, 62)
    assert killed == ["worker of slow"]
    assert (slow.max_failures, late.max_failures) == (0, 2)  # it is not tried again
    assert limit.explain_death(slow) == "it took longer than --trial-time-limit (60 s) and was ended"
    assert limit.explain_death(late) == "its worker died, and Ray left no reason"


@pytest.mark.parametrize("end", ["on_trial_complete", "on_trial_error"])
def test_trial_that_is_over_is_left_alone(limit: TimeLimit, clock: Clock, killed: list[str], end: str) -> None:
    trial = make_trial("a")
    limit.on_trial_start(0, [], trial)
    getattr(limit, end)(0, [], trial)
    look(limit, clock, 100)
    assert killed == []


def test_attempts_of_a_trial_add_up_but_not_its_wait_for_another_worker(
    limit: TimeLimit, clock: Clock, killed: list[str]
) -> None:
    trial = make_trial("a")
    limit.on_trial_start(0, [], trial)
    clock.now = 50
    limit.on_trial_recover(0, [], trial)  # its worker died
    look(limit, clock, 500)
    limit.on_trial_start(0, [], trial)
    look(limit, clock, 509)
    assert killed == []
    look(limit, clock, 511)
    assert killed == ["worker of a"]


def test_trial_between_two_workers_is_not_killed_but_soon_after(
    limit: TimeLimit, clock: Clock, killed: list[str]
) -> None:
    trial = make_trial("a")
    limit.on_trial_start(0, [], trial)
    trial.temporary_state.ray_actor = None
    look(limit, clock, 61)
    assert killed == []
    trial.temporary_state.ray_actor = "the second"
    look(limit, clock, 61 + LOOK_SECONDS)
    assert killed == ["the second"]


def test_without_a_limit_nothing_is_killed(clock: Clock, killed: list[str]) -> None:
    limit = TimeLimit(None, kill=killed.append, clock=clock)
    limit.on_trial_start(0, [], make_trial("a"))
    look(limit, clock, 1e9)
    assert killed == []
