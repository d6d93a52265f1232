"""Where slot time goes: hand-made timelines with known answers, and a real search whose ledger adds up."""

import dataclasses
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_amp.config import InputError, TrialStatus
from tune_amp.ledger import (
    ENDS,
    WORK,
    Ledger,
    SlotClock,
    SlotTimes,
    TimeKind,
    TrialTime,
    WorkerTime,
    build_ledger,
    read_process_age,
)

Seconds = dict[str, float]


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# In the worker


@pytest.fixture
def hand() -> Hand:
    return Hand()


def test_clock_counts_each_moment_once_and_what_lies_within_as_its_own_kind(hand: Hand) -> None:
    clock = SlotClock(3.0, hand)
    hand.now += 1  # still starting
    clock.switch(TimeKind.IDLE)
    hand.now += 2
    with clock.spending(TimeKind.CHECKPOINT):
        hand.now += 4
        with clock.spending(TimeKind.START_UP):
            hand.now += 8
        hand.now += 16
    hand.now += 32
    assert clock.read() == {"start-up": 12.0, "idle": 34.0, "checkpoint": 20.0}


def test_reading_holds_what_passed_since_the_last_one(hand: Hand) -> None:
    clock = SlotClock(5.0, hand)
    with clock.spending(TimeKind.OTHER):
        hand.now += 1
        assert clock.read() == {"start-up": 5.0, "other": 1.0}
        hand.now += 2
    assert clock.read() == {"other": 2.0}
    assert clock.read() == {}


def test_time_of_a_block_that_raises_counts_too(hand: Hand) -> None:
    clock = SlotClock(0.0, hand)
    clock.switch(TimeKind.IDLE)

    def save() -> None:
        with clock.spending(TimeKind.CHECKPOINT):
            hand.now += 3
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    hand.now += 1
    assert clock.read() == {"checkpoint": 3.0, "idle": 1.0}


def test_no_more_is_moved_to_another_kind_than_there_is(hand: Hand) -> None:
    clock = SlotClock(0.0, hand)
    with clock.spending(TimeKind.OTHER):
        hand.now += 10
        clock.move(TimeKind.OTHER, TimeKind.TRAINING, 7)
        clock.move(TimeKind.OTHER, TimeKind.VALIDATION, 7)
        clock.move(TimeKind.OTHER, TimeKind.PROBE, -1)
    assert clock.read() == {"training": 7.0, "validation": 3.0}


def test_clock_that_goes_back_takes_nothing_away(hand: Hand) -> None:
    clock = SlotClock(-5.0, hand)
    with clock.spending(TimeKind.OTHER):
        hand.now += 2
    hand.now -= 50
    with clock.spending(TimeKind.CHECKPOINT):
        hand.now += 1
    assert clock.read() == {"other": 2.0, "checkpoint": 1.0}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_age_of_a_process_counts_from_its_start_not_from_its_first_question() -> None:
    code = "import time; time.sleep(0.5); from tune_amp.ledger import read_process_age; print(read_process_age())"
    started = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 0.45 < told < time.monotonic() - started + 0.05
    assert read_process_age() > 0


# Hand-made timelines: SlotTimes as the driver feeds it, and the ledger that comes out


def finished(status: str, times: SlotTimes, trial_id: str, **kept: float) -> TrialTime:
    return TrialTime(
        status=TrialStatus(status),
        spent=times.find_work(trial_id),
        kept={TimeKind(kind): seconds for kind, seconds in kept.items()},
    )


def settle(times: SlotTimes, *trials: TrialTime, slots: int, end: float) -> Ledger:
    return build_ledger(times.workers, trials, slots=slots, begin=0.0, end=end)


def assert_ledger(ledger: Ledger, **expected: float) -> None:
    named = {name.replace("start_up", "start-up").replace("_", " "): seconds for name, seconds in expected.items()}
    assert ledger.seconds == pytest.approx(named)
    assert sum(named.values()) == pytest.approx(ledger.slot_seconds), "the example itself must add up"


def test_two_slots_with_a_stopped_and_a_completed_trial_and_a_wait_at_the_end() -> None:
    times = SlotTimes()
    times.start("a", "one", 10)
    times.start("b", "two", 12)
    # Worker one: its process began at 4, its first report came at 15.
    times.report("a", {"start-up": 6, "idle": 0.5, "training": 3, "validation": 1, "other": 0.5}, 15)
    times.report("b", {"start-up": 9, "data": 1, "training": 6, "probe": 1, "checkpoint": 1}, 20)
    times.start("c", "one", 15.5)
    times.report("c", {"start-up": 0.5, "idle": 0.5, "training": 7, "validation": 2}, 25)
    ledger = settle(
        times,
        finished("stopped", times, "a", training=3, validation=1),
        finished("completed", times, "b", training=6, probe=1),
        finished("completed", times, "c", training=7, validation=2),
        slots=2,
        end=30,
    )
    assert_ledger(
        ledger,
        training=13,
        validation=2,
        probe=1,
        stopped=4,
        data=1,
        start_up=(4 + 6 + 0.5) + (2 + 9),  # 15 - 11 = 4 until one's process began, 20 - 18 = 2 until two's
        checkpoint=1,
        idle=0.5 + 0.5 + 5 + 10,
        other=0.5,
    )
    assert ledger.step_seconds == 16
    assert ledger.useful == pytest.approx(13 / 60)
    assert ledger.efficiency == pytest.approx(16 / 60)


def test_work_of_a_dead_worker_that_no_checkpoint_kept_is_failed() -> None:
    """Epochs of 4 s, saved after the first; the worker dies 1 s into the third."""
    times = SlotTimes()
    times.start("a", "one", 2)
    times.report("a", {"start-up": 2, "training": 4}, 6)
    times.report("a", {"checkpoint": 1, "training": 4}, 11)
    times.lose("a", 12)
    times.start("a", "two", 16)  # its process began at 13
    times.report("a", {"start-up": 3, "checkpoint": 0.5, "training": 4}, 20.5)  # the second epoch, again
    times.report("a", {"training": 4}, 24.5)
    trial = finished("completed", times, "a", training=12)
    ledger = settle(times, trial, slots=1, end=24.5)
    assert_ledger(ledger, training=12, failed=4 + 1, start_up=2 + 3, checkpoint=1.5, idle=1)
    assert ledger.step_seconds == 16


def test_worker_that_dies_before_its_first_report_has_started_and_failed() -> None:
    times = SlotTimes()
    times.start("a", "one", 5)
    times.lose("a", 7)
    times.lose("a", 9)  # told twice: by the recovery and by the end
    ledger = settle(times, finished("failed", times, "a"), slots=1, end=10)
    assert_ledger(ledger, start_up=5, failed=2, idle=3)


def test_reused_worker_that_dies_with_its_next_trial_was_idle_in_between() -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 1, "training": 3}, 4)
    times.start("b", "one", 6)
    times.lose("b", 9)
    a, b = finished("completed", times, "a", training=3), finished("failed", times, "b")
    assert_ledger(settle(times, a, b, slots=1, end=9), start_up=1, training=3, idle=2, failed=3)


def test_what_was_cut_off_at_the_end_is_interrupted() -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 1, "training": 3}, 4)
    times.lose("a", 10, TimeKind.INTERRUPTED)
    trial = finished("interrupted", times, "a", training=3)
    assert_ledger(settle(times, trial, slots=1, end=10), start_up=1, interrupted=9)


@pytest.mark.parametrize(("status", "kind"), [("out_of_memory", "out_of_memory"), ("failed", "failed")])
def test_step_that_raised_counts_as_how_the_trial_ended(status: str, kind: str) -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 1, "training": 3}, 4)
    times.report("a", {"failed": 2}, 6)
    trial = finished(status, times, "a", training=3)
    assert_ledger(settle(times, trial, slots=1, end=6), start_up=1, **{kind: 5})


def test_attempt_that_a_completed_trial_began_anew_is_failed() -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 1, "training": 3}, 4)
    times.report("a", {"failed": 2, "training": 3}, 9)  # raised in its second epoch, then trained the first again
    trial = finished("completed", times, "a", training=3)
    assert_ledger(settle(times, trial, slots=1, end=9), start_up=1, training=3, failed=5)


@pytest.mark.parametrize("status", [status for status in TrialStatus if status is not TrialStatus.COMPLETED])
def test_all_work_of_a_trial_that_did_not_complete_counts_as_its_end(status: TrialStatus) -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 1, "training": 3, "validation": 2, "probe": 1, "data": 0.5}, 7.5)
    trial = finished(status, times, "a", training=3, validation=2, probe=1)
    ledger = settle(times, trial, slots=1, end=7.5)
    assert ledger.seconds == {ENDS[status]: 6.0, "start-up": 1.0, "data": 0.5}


def test_slots_that_no_worker_came_to_start_up_with_the_others_and_are_idle_then() -> None:
    times = SlotTimes()
    times.start("a", "one", 4)
    times.report("a", {"start-up": 4, "training": 6}, 10)
    trial = finished("completed", times, "a", training=6)
    assert_ledger(settle(times, trial, slots=3, end=10), training=6, start_up=4 * 3, idle=6 * 2)


def test_search_that_ended_before_any_worker_was_there_only_started_up() -> None:
    assert build_ledger([], [], slots=2, begin=5, end=8).seconds == {"start-up": 6.0}


def test_process_that_ray_had_ready_is_not_counted_while_another_held_its_slot() -> None:
    times = SlotTimes()
    times.start("a", "one", 2)
    times.report("a", {"start-up": 2, "training": 8}, 10)
    times.lose("a", 11)
    times.start("a", "two", 12)
    times.report("a", {"start-up": 12, "training": 3}, 15)  # as old as the search
    trial = finished("completed", times, "a", training=3)
    assert_ledger(settle(times, trial, slots=1, end=15), training=3, failed=9, start_up=2 + 1)


def test_processes_of_an_earlier_search_begin_with_this_one() -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 600, "training": 2}, 3)
    trial = finished("completed", times, "a", training=2)
    assert_ledger(settle(times, trial, slots=1, end=3), training=2, start_up=1)


def test_what_no_clock_covers_is_told_as_other() -> None:
    times = SlotTimes()
    times.start("a", "one", 1)
    times.report("a", {"start-up": 1, "training": 2}, 3)
    times.report("a", {"training": 2}, 8)  # 5 s by the driver's clock
    trial = finished("completed", times, "a", training=4)
    assert_ledger(settle(times, trial, slots=1, end=8), training=4, start_up=1, other=3)


def test_clock_of_the_driver_that_goes_back_gives_no_negative_seconds() -> None:
    times = SlotTimes()
    times.start("a", "one", 10)
    times.report("a", {"start-up": 5, "training": 2, "idle": -1}, 12)
    times.start("b", "one", 3)
    times.lose("b", 2)
    times.start("b", "two", 1)
    times.report("b", {"training": 4}, 5)
    trials = [finished("completed", times, "a", training=2), finished("stopped", times, "b", training=4)]
    ledger = settle(times, *trials, slots=1, end=14)
    assert all(seconds >= 0 for seconds in ledger.seconds.values())
    assert build_ledger(times.workers, trials, slots=1, begin=10, end=9).wall_seconds == 0
    assert ledger.seconds["training"] == 2


def test_workers_are_numbered_as_they_come() -> None:
    times = SlotTimes()
    times.start("a", "x", 1)
    times.start("b", "y", 2)
    assert times.report("b", {"training": 1}, 3) == 2
    assert times.report("a", {"training": 1}, 3) == 1
    times.start("c", "y", 4)
    assert times.report("c", {"training": 1}, 5) == 2


# Any timeline


@st.composite
def slot_timelines(draw: st.DrawFn) -> tuple[list[tuple[WorkerTime, list[TrialTime]]], float]:
    """Workers one after another in a slot, each telling all that it did; and when the last was done."""
    now = draw(st.floats(0, 5))
    workers = []
    for _ in range(draw(st.integers(0, 3))):
        began = now + draw(st.floats(0, 3))
        spent = {kind: draw(st.floats(0, 10)) for kind in (TimeKind.START_UP, TimeKind.IDLE, TimeKind.CHECKPOINT)}
        ready = began + spent[TimeKind.START_UP]
        trials = draw(st.lists(trial_times, max_size=3))
        now = began + sum(spent.values()) + sum(sum(trial.spent.values()) for trial in trials)
        workers.append((WorkerTime(began=began, ready=ready, end=now, spent=spent), trials))
    return workers, now


def build_trial(status: TrialStatus, spent: dict[TimeKind, float], share: float) -> TrialTime:
    kept = {kind: seconds * share for kind, seconds in spent.items() if kind in WORK}
    return TrialTime(status=status, spent=spent, kept=kept)


trial_times = st.builds(
    build_trial,
    st.sampled_from(TrialStatus),
    st.dictionaries(st.sampled_from([*WORK, TimeKind.FAILED, TimeKind.INTERRUPTED]), st.floats(0, 20)),
    st.floats(0, 1),
)


@given(timelines=st.lists(slot_timelines(), min_size=1, max_size=4), rest=st.floats(0, 10))
def test_kinds_are_never_negative_and_add_up_to_the_slot_time(timelines: list[Any], rest: float) -> None:
    end = max(now for _, now in timelines) + rest
    told = [worker for workers, _ in timelines for worker in workers]
    trials = [trial for _, of_worker in told for trial in of_worker]
    ledger = build_ledger([worker for worker, _ in told], trials, slots=len(timelines), begin=0.0, end=end)
    assert all(seconds >= 0 for seconds in ledger.seconds.values())
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.slot_seconds, abs=1e-6)
    assert ledger.step_seconds == pytest.approx(sum(trial.spent.get(TimeKind.TRAINING, 0.0) for trial in trials))


# The ledger itself

LEDGER = Ledger(slots=2, wall_seconds=10.0, seconds={"idle": 5.0, "training": 15.0}, step_seconds=16.0)


def test_shares_are_of_the_slot_time_in_a_fixed_order() -> None:
    assert list(LEDGER.shares.items()) == [("training", 0.75), ("idle", 0.25)]
    assert (LEDGER.useful, LEDGER.efficiency) == (0.75, 0.8)
    nothing = dataclasses.replace(LEDGER, wall_seconds=0.0, seconds={}, step_seconds=0.0)
    assert (nothing.shares, nothing.useful, nothing.efficiency) == ({}, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": {"dreaming": 1.0}}, "seconds: must be of training, .*, got 'dreaming'"),
        ({"seconds": {"idle": -1.0}}, r"idle: must be between 0 and 1e\+12 seconds, got -1\.0"),
        ({"seconds": [1.0]}, r"seconds: must map kinds to seconds, got \[1\.0\]"),
        ({"wall_seconds": float("nan")}, "wall_seconds: must be a finite number, got nan"),
        ({"slots": 1.5}, "slots: must be a whole number, got 1.5"),
    ],
)
def test_ledger_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LEDGER, **changes)


def test_totals_by_kind_hold_all_that_was_told_and_what_was_lost_and_never_fall() -> None:
    times = SlotTimes()
    times.start("a", "worker", now=10.0)
    times.report("a", {"start-up": 3.0, "training": 2.0, "idle": 0.5}, now=12.0)
    times.report("a", {"training": 1.0, "failed": -1.0}, now=13.0)
    times.lose("a", now=17.0)
    told = {kind: seconds for kind, seconds in times.totals.items() if seconds}
    assert told == {"start-up": 3.0, "training": 3.0, "idle": 0.5, "failed": 4.0}
    assert set(times.totals) == set(TimeKind)


def test_slots_of_nodes_that_joined_are_slots() -> None:
    def work(ready: float, end: float) -> WorkerTime:
        return WorkerTime(began=ready - 1, ready=ready, end=end, spent={TimeKind.START_UP: 1.0})

    # Two at first, a third from 11 to 20; and one that takes the place of another at 20, which is no fourth.
    workers = [work(2, 20), work(2, 30), work(11, 20), work(20, 30)]
    ledger = build_ledger(workers, [], slots=2, begin=0, end=30)
    assert ledger.slots == 3
    assert sum(ledger.seconds.values()) == pytest.approx(90)
    assert build_ledger(workers, [], slots=4, begin=0, end=30).slots == 4
