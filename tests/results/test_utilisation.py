import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import make_epoch, make_trial

from tune_amp.results.records import SlotTime, TrialRecord
from tune_amp.results.utilisation import SlotUse, describe_utilisation, find_shares, utilisation
from tune_amp.trial.config import TrialStatus

SLOT_TIME = SlotTime(slots=2, wall_seconds=50.0)


def make(number: int, status: TrialStatus, *epochs: dict[str, float], wall_seconds: float = 20.0) -> TrialRecord:
    reports = tuple(make_epoch(epoch, **seconds) for epoch, seconds in enumerate(epochs, start=1))
    return make_trial(f"{number}", status=status, epochs=reports, wall_seconds=wall_seconds)


def test_every_use_is_computed_from_how_trials_ended_and_their_last_report() -> None:
    first = {"train_seconds": 8.0, "val_seconds": 0.5, "probe_seconds": 0.25}
    last = {"train_seconds": 16.0, "val_seconds": 1.0, "probe_seconds": 0.5}
    trials = [
        make(1, TrialStatus.COMPLETED, first, last),
        make(2, TrialStatus.STOPPED, first),
        make(3, TrialStatus.INTERRUPTED, first),
        make(4, TrialStatus.INTERRUPTED),
        make(5, TrialStatus.DIVERGED, first, wall_seconds=12.0),
        make(6, TrialStatus.OUT_OF_MEMORY, wall_seconds=6.0),
        make(7, TrialStatus.FAILED, last, wall_seconds=20.0),
    ]
    assert utilisation(trials, SLOT_TIME) == {
        SlotUse.USEFUL: 16.0,
        SlotUse.STOPPED: 16.0,
        SlotUse.LOST: 38.0,
        SlotUse.EVALUATION: 3.0,
        SlotUse.REST: 27.0,
    }


def test_search_without_a_report_has_only_rest() -> None:
    assert utilisation([], SLOT_TIME) == dict.fromkeys(SlotUse, 0.0) | {SlotUse.REST: 100.0}
    assert find_shares(utilisation([], SlotTime(slots=2, wall_seconds=0.0))) == {}


@given(
    st.lists(st.tuples(st.sampled_from(TrialStatus), st.floats(0, 1e6), st.floats(0, 1e6)), max_size=8),
    st.floats(0, 1e6),
)
def test_no_use_is_negative_and_shares_are_of_a_whole(
    ends: list[tuple[TrialStatus, float, float]], wall_seconds: float
) -> None:
    """Also for trials that took more time than there was, which no search writes."""
    trials = [
        make(number, status, {"train_seconds": seconds, "val_seconds": 0.0, "probe_seconds": 0.0}, wall_seconds=wall)
        for number, (status, seconds, wall) in enumerate(ends)
    ]
    seconds = utilisation(trials, SlotTime(slots=3, wall_seconds=wall_seconds))
    assert all(value >= 0 for value in seconds.values())
    assert sum(find_shares(seconds).values()) == pytest.approx(1.0 if sum(seconds.values()) else 0.0, abs=0.003)


def test_line_names_the_uses_in_a_fixed_order_without_those_that_round_to_nothing() -> None:
    seconds = {"train_seconds": 40.0, "val_seconds": 0.04, "probe_seconds": 0.0}
    trials = [make(1, TrialStatus.FAILED, wall_seconds=10.0), make(2, TrialStatus.COMPLETED, seconds)]
    told = "2 slots x 50.0 s: useful training 40.0%, hopeless or failed 10.0%, rest 50.0%"
    assert describe_utilisation(trials, SLOT_TIME) == told
    assert describe_utilisation([], SlotTime(slots=1, wall_seconds=2.0)) == "1 slot x 2.0 s: rest 100.0%"
