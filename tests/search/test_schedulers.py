"""Ray's schedulers and ours, side by side: alike where all is well, and not where a trial diverges, fails or repeats.

Where a half of a test shows Ray's fault and begins to fail, Ray has mended it, and our repair may be superfluous.
"""

import contextlib
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import past_runs as made
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import (
    ASHAScheduler,
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
)

from tune_amp.search.options import SearchOptions
from tune_amp.search.schedulers import (
    DivergenceAware,
    build_scheduler,
    count_brackets,
    find_worst_value,
    objective_mode,
    restore_scheduler,
)
from tune_amp.trial.config import OBJECTIVES, RANKING_OBJECTIVES, SCHEDULERS
from tune_amp.trial.report import TrialReport

NAN, INF = math.nan, math.inf
SETTINGS: dict[str, Any] = {"grace_period": 1, "reduction_factor": 2}
FAILED = {"val_accuracy": NAN, "val_loss": NAN, "status": "failed", "done": True}


class Trial:
    """What the schedulers know of Ray's Trial: its id, and that it can be a key."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def ignore(trial: Any) -> None:
    """Dead workers are of no interest here."""


def make_ours(name: str = "asha", objective: str = "val_accuracy", max_epochs: int = 8, **settings: Any) -> Any:
    on_worker_death = settings.pop("on_worker_death", ignore)
    about = SETTINGS | settings | {"objective": objective, "max_epochs": max_epochs}
    return build_scheduler(SearchOptions(scheduler=name, **about), on_worker_death)


def make_stock(name: str = "asha", objective: str = "val_accuracy", max_epochs: int = 8, **settings: Any) -> Any:
    settings = SETTINGS | settings
    measured: dict[str, Any] = {"time_attr": "epoch", "metric": objective, "mode": objective_mode(objective)}
    match name:
        case "asha":
            return ASHAScheduler(**measured, max_t=max_epochs, **settings)
        case "hyperband":
            brackets = count_brackets(max_epochs, **settings)
            return AsyncHyperBandScheduler(**measured, max_t=max_epochs, brackets=brackets, **settings)
        case "median":
            # A time slice without an end: no pauses, which are another test's subject.
            never: Any = INF
            return MedianStoppingRule(**measured, grace_period=settings["grace_period"], min_time_slice=never)
    return FIFOScheduler()


def make_result(epoch: int, value: float, objective: str = "val_accuracy", **changes: Any) -> dict[str, Any]:
    return {"train_loss": 0.5, "val_loss": 0.5, "val_accuracy": 0.5, "epoch": epoch, objective: value} | changes


def add(scheduler: Any, trial_id: str) -> Trial:
    trial = Trial(trial_id)
    scheduler.on_trial_add(None, trial)
    return trial


def decide(scheduler: Any, results: Sequence[dict[str, Any]]) -> list[str]:
    """What the scheduler says to each result, every one from a trial of its own."""
    return [scheduler.on_trial_result(None, add(scheduler, f"{n:08x}"), result) for n, result in enumerate(results)]


def rung(scheduler: Any, milestone: int) -> dict[str, float]:
    [bracket] = scheduler._brackets
    return dict(next(recorded for at, recorded in bracket._rungs if at == milestone))


def memory(scheduler: Any) -> Any:
    """All that a scheduler of Ray's remembers of the values that it was told."""
    values = {trial.trial_id: results for trial, results in getattr(scheduler, "_results", {}).items()}
    return [bracket._rungs for bracket in getattr(scheduler, "_brackets", ())], values


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Numpy's global generator in a known state, and put back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


# Where all is well


STEPS = st.lists(st.tuples(st.integers(0, 7), st.floats(0, 3)), max_size=60)


@pytest.mark.parametrize("name", SCHEDULERS)
@given(
    objective=st.sampled_from(RANKING_OBJECTIVES),
    max_epochs=st.integers(1, 9),
    grace_period=st.integers(1, 9),
    reduction_factor=st.sampled_from([1.5, 2.0, 3.0, 4.0]),
    steps=STEPS,
)
def test_decisions_on_finite_results_are_those_of_stock(
    name: str,
    objective: str,
    max_epochs: int,
    grace_period: int,
    reduction_factor: float,
    steps: list[tuple[int, float]],
) -> None:
    settings = {"grace_period": min(grace_period, max_epochs), "reduction_factor": reduction_factor}
    ours, stock = (make(name, objective, max_epochs, **settings) for make in (make_ours, make_stock))
    with seeded(0):  # as ours draws brackets
        pairs = [(add(ours, f"{n}"), add(stock, f"{n}")) for n in range(8)]
    epochs = [0] * 8
    for number, value in steps:
        if epochs[number] == max_epochs:
            continue
        epochs[number] += 1
        result = make_result(epochs[number], value, objective)
        said = ["STOP", "STOP"]
        if epochs[number] < max_epochs:  # Tune does not ask about a trial that is done
            said = [
                each.on_trial_result(None, trial, result)
                for each, trial in zip((ours, stock), pairs[number], strict=True)
            ]
        assert said[0] == said[1]
        if said[0] == "STOP":
            epochs[number] = max_epochs
            for each, trial in zip((ours, stock), pairs[number], strict=True):
                each.on_trial_complete(None, trial, result)
    assert memory(ours) == memory(stock)


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_full_budget_ends_a_trial(name: str) -> None:
    assert decide(make_ours(name, max_epochs=3), [make_result(3, 0.9)]) == ["STOP"]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_no_finite_trial_is_stopped_before_its_grace_period(name: str) -> None:
    scheduler = make_ours(name, grace_period=3)
    said = [decide(scheduler, [make_result(epoch, 0.9 - n / 10) for n in range(9)]) for epoch in (1, 2, 3)]
    assert said[:2] == [["CONTINUE"] * 9] * 2
    assert "STOP" in said[2]


def test_scheduler_none_gives_every_finite_trial_its_full_budget() -> None:
    results = [make_result(epoch, 0.9 - n / 10) for epoch in range(1, 8) for n in range(9)]
    assert set(decide(make_ours("none"), results)) == {"CONTINUE"}


# A trial that diverged


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trial_that_diverges_between_two_rungs_is_stopped_at_once(name: str) -> None:
    scheduler = make_ours(name)
    healthy = [add(scheduler, f"healthy {n}") for n in range(4)]
    diverged = add(scheduler, "diverged")
    for epoch in range(1, 4):
        said = [scheduler.on_trial_result(None, trial, make_result(epoch, 0.5)) for trial in healthy]
        assert said == ["CONTINUE"] * 4
        value = 0.75 if epoch < 3 else NAN
        expected = "CONTINUE" if epoch < 3 else "STOP"
        assert scheduler.on_trial_result(None, diverged, make_result(epoch, value)) == expected


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "hopeless",
    [{"val_loss": NAN}, {"val_loss": INF}, {"val_accuracy": NAN}, {"status": "diverged"}],
)
def test_the_very_first_report_of_a_trial_that_diverged_stops_it(name: str, hopeless: dict[str, Any]) -> None:
    assert decide(make_ours(name), [make_result(1, 0.99, **hopeless)]) == ["STOP"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("train_loss", [NAN, INF])
def test_trial_some_of_whose_batches_overflowed_goes_on_as_its_validation_ranks_it(
    name: str, train_loss: float
) -> None:
    """Its weights are finite, and so is what they make of validation images: the next epoch may be fine."""
    scheduler = make_ours(name)
    calm = [make_result(1, 0.3) for _ in range(4)]
    assert decide(scheduler, [*calm, make_result(1, 0.99, train_loss=train_loss)])[-1] == "CONTINUE"
    assert 0.0 not in [value for rungs in memory(scheduler)[0] for _, recorded in rungs for value in recorded.values()]


@pytest.mark.parametrize("hopeless", [{"val_loss": NAN}, {"val_loss": -INF}, {"status": "diverged"}])
def test_trial_that_diverged_ranks_last_however_good_its_accuracy(hopeless: dict[str, Any]) -> None:
    scheduler = make_ours()
    decide(scheduler, [make_result(1, 0.3, status="running"), make_result(1, 0.99, **hopeless)])
    assert sorted(rung(scheduler, 1).values()) == [0.0, 0.3]


@pytest.mark.parametrize("objective", RANKING_OBJECTIVES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_trial_that_diverged_counts_as_worst_in_the_percentile_of_its_rung(objective: str, value: float) -> None:
    better, middling = {"val_accuracy": (0.9, 0.5), "val_loss": (0.1, 0.5)}[objective]
    diverged_first = [make_result(1, value, objective), make_result(1, better, objective)]
    scheduler = make_ours("asha", objective)
    decide(scheduler, diverged_first)
    sign = {"val_accuracy": 1, "val_loss": -1}[objective]
    assert sorted(rung(scheduler, 1).values()) == [sign * find_worst_value(objective), sign * better]
    # The cutoff is the median of the worst and a good one, which a middling trial exceeds.
    results = [*diverged_first, make_result(1, middling, objective)]
    assert decide(make_ours("asha", objective), results)[-1] == "CONTINUE"


def test_median_rule_measures_the_others_by_trials_that_diverged() -> None:
    good = [make_result(1, 0.9), make_result(1, 0.8)]
    few = [*good, make_result(1, NAN), make_result(1, 0.3)]
    assert decide(make_ours("median"), few)[-1] == "STOP"  # the median of 0.9, 0.8 and 0
    many = [*good, make_result(1, 0.7), *[make_result(1, NAN)] * 3, make_result(1, 0.5)]
    assert decide(make_ours("median"), many)[-1] == "CONTINUE"  # 0.35: stock would say 0.8


def test_end_of_a_diverged_trial_is_recorded_as_the_worst_of_its_rung() -> None:
    scheduler = make_ours("asha", "val_loss")
    scheduler.on_trial_complete(None, add(scheduler, "diverged"), make_result(2, NAN, "val_loss"))
    assert rung(scheduler, 2) == {"diverged": -1e9}
    assert rung(scheduler, 1) == {}
    # -1e9 and a good loss: the next is not dragged below the cutoff by an infinite or NaN interpolation.
    assert decide(scheduler, [make_result(2, 0.1, "val_loss"), make_result(2, 0.3, "val_loss")])[-1] == "CONTINUE"
    collapsed = make_ours()
    collapsed.on_trial_complete(None, add(collapsed, "ended"), make_result(2, 0.99, status="diverged"))
    assert rung(collapsed, 2) == {"ended": 0.0}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_result_is_not_changed_for_those_who_read_it_next(name: str) -> None:
    result = make_result(1, NAN)
    before = result.copy()
    decide(make_ours(name), [result])
    assert result == before  # nan is nan: the same object


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_worst_value_is_worse_than_any_that_training_can_report(objective: str) -> None:
    possible = {"val_accuracy": 0.001, "val_loss": 1e6, "train_seconds": 1e8, "peak_memory_bytes": 2**48}[objective]
    better = max if objective_mode(objective) == "max" else min
    assert better(possible, find_worst_value(objective)) == possible
    assert math.isfinite(find_worst_value(objective))  # ASHA interpolates


# A trial that fails, or is tried again


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_report_of_a_failure_without_an_epoch_changes_nothing(name: str, status: str) -> None:
    results = [make_result(1, value) for value in (0.9, 0.8, 0.7, 0.1, 0.05)]
    scheduler, untouched = make_ours(name), make_ours(name)
    failed, _ = add(scheduler, "failed"), add(untouched, "failed")
    assert scheduler.on_trial_result(None, failed, FAILED | {"status": status}) == "CONTINUE"
    scheduler.on_trial_complete(None, failed, FAILED | {"status": status})
    assert decide(scheduler, results) == decide(untouched, results)
    assert memory(scheduler) == memory(untouched)


def test_stock_median_fails_at_the_next_report_after_one_without_an_epoch() -> None:
    scheduler = make_stock("median")
    scheduler.on_trial_complete(None, add(scheduler, "failed"), FAILED)
    with pytest.raises(KeyError, match="epoch"):
        decide(scheduler, [make_result(1, 0.9)])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_death_of_a_worker_is_passed_on_with_its_trial(name: str) -> None:
    dead: list[Trial] = []
    scheduler = make_ours(name, on_worker_death=dead.append)
    trial, _ = add(scheduler, "dies"), add(scheduler, "lives")
    assert dead == []
    scheduler.on_trial_error(None, trial)
    scheduler.on_trial_error(None, trial)
    assert dead == [trial, trial]


class Controller:
    """Of Tune's, what a scheduler may use to choose a trial."""

    def __init__(self, *statuses: str) -> None:
        self.trials: list[Any] = [Trial(f"{number}") for number in range(len(statuses))]
        for trial, status in zip(self.trials, statuses, strict=True):
            trial.status = status

    def get_trials(self) -> list[Any]:
        return self.trials

    get_live_trials = get_trials

    def _set_trial_status(self, trial: Any, status: str) -> None:
        trial.status = status


def test_trial_that_has_to_wait_is_paused_until_its_time_has_come_and_holds_up_no_other() -> None:
    now = [100.0]
    scheduler = DivergenceAware(objective="val_loss", on_worker_death=lambda trial: 10.0, clock=lambda: now[0])
    controller = Controller("ERROR", "PENDING", "ERROR")  # the last has failed for good
    died, other, _ = controller.trials
    scheduler.on_trial_error(controller, died)
    died.status = "PENDING"  # Tune queues it again
    assert scheduler.choose_trial_to_run(controller) == other
    assert died.status == "PAUSED"
    other.status = "TERMINATED"
    now[0] = 109.9
    assert scheduler.choose_trial_to_run(controller) is None
    now[0] = 110.0
    assert scheduler.choose_trial_to_run(controller) is died


def test_trial_that_need_not_wait_is_chosen_at_once() -> None:
    scheduler, controller = make_ours(), Controller("ERROR")
    scheduler.on_trial_error(controller, controller.trials[0])
    controller.trials[0].status = "PENDING"
    assert scheduler.choose_trial_to_run(controller) is controller.trials[0]
    assert controller.trials[0].status == "PENDING"


@pytest.mark.parametrize("name", SCHEDULERS)
@given(steps=STEPS, deaths=st.lists(st.integers(0, 60), max_size=4))
def test_epochs_that_a_retried_trial_reports_again_count_once(
    name: str, steps: list[tuple[int, float]], deaths: list[int]
) -> None:
    retried, calm = make_ours(name), make_ours(name)
    pairs = [(add(retried, f"{n}"), add(calm, f"{n}")) for n in range(8)]
    histories: list[list[dict[str, Any]]] = [[] for _ in range(8)]
    stopped = set()
    for place, (number, value) in enumerate(steps):
        trial, twin = pairs[number]
        history = histories[number]
        if number in stopped or len(history) == 7:
            continue
        if place in deaths:  # as Ray does, with no checkpoint to go on from
            retried.on_trial_error(None, trial)
            retried.on_trial_add(None, trial)
            assert {retried.on_trial_result(None, trial, earlier) for earlier in history} <= {"CONTINUE"}
        history.append(make_result(len(history) + 1, value))
        said = calm.on_trial_result(None, twin, history[-1])
        assert retried.on_trial_result(None, trial, history[-1]) == said
        if said == "STOP":
            stopped.add(number)
    assert memory(retried) == memory(calm)


def test_stock_puts_a_retried_trial_into_several_brackets_and_ours_leaves_it_where_it_is() -> None:
    held = {}
    for make in (make_stock, make_ours):
        scheduler = make("hyperband")
        trial = Trial("dies often")
        with seeded(0):
            for _ in range(20):
                scheduler.on_trial_add(None, trial)
                scheduler.on_trial_result(None, trial, make_result(4, 0.5))
                scheduler.on_trial_error(None, trial)
        held[make] = sum(any(recorded for _, recorded in bracket._rungs) for bracket in scheduler._brackets)
    assert held == {make_stock: 3, make_ours: 1}


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_trial_whose_worker_died_before_the_stop_reached_it_is_stopped_when_tried_again(name: str) -> None:
    for make in (make_stock, make_ours):
        scheduler = make(name)
        with seeded(0):
            trials = [add(scheduler, f"{n}") for n in range(12)]
        for trial in trials[:-1]:
            scheduler.on_trial_result(None, trial, make_result(4, 0.9))
        late = trials[-1]
        assert scheduler.on_trial_result(None, late, make_result(4, 0.1)) == "STOP"
        scheduler.on_trial_error(None, late)
        if make is make_ours:
            scheduler.on_trial_add(None, late)
            assert scheduler.on_trial_result(None, late, make_result(4, 0.1)) == "STOP"
        elif name == "median":
            with pytest.raises(AssertionError):
                scheduler.on_trial_result(None, late, make_result(4, 0.1))
        else:
            assert scheduler.on_trial_result(None, late, make_result(4, 0.1)) == "CONTINUE"


# What only one of them does


def test_stock_median_pauses_trials_while_others_wait_and_ours_does_not() -> None:
    controller: Any = types.SimpleNamespace(get_live_trials=lambda: [types.SimpleNamespace(status="PENDING")])
    stock: Any = MedianStoppingRule(time_attr="epoch", metric="val_accuracy", mode="max", grace_period=1)
    for scheduler, expected in ((stock, "PAUSE"), (make_ours("median"), "CONTINUE")):
        assert scheduler.on_trial_result(controller, add(scheduler, "first"), make_result(1, 0.9)) == expected


def test_ray_hyperband_that_waits_stops_nothing_with_few_trials_at_a_time_and_ours_stops_some() -> None:
    waiting: Any = HyperBandScheduler(time_attr="epoch", metric="val_accuracy", mode="max", max_t=8, reduction_factor=2)
    decisions = []
    for scheduler in (waiting, make_ours("hyperband")):
        said = set()
        for start in range(0, 40, 4):
            numbers = range(start, start + 4)
            trials = [add(scheduler, f"{n}") for n in numbers]
            for epoch in range(1, 8):
                for n, trial in zip(numbers, trials, strict=True):
                    said.add(scheduler.on_trial_result(None, trial, make_result(epoch, n % 7 / 10)))
            for trial in trials:
                scheduler.on_trial_complete(None, trial, make_result(8, 0.9))
        decisions.append(said)
    assert decisions == [{"CONTINUE"}, {"CONTINUE", "STOP"}]


def test_hyperband_gives_trials_different_grace_periods_most_of_them_the_shortest() -> None:
    scheduler = make_ours("hyperband")
    for n in range(100):
        scheduler.on_trial_result(None, add(scheduler, f"{n}"), make_result(8 - 1, n / 100))
    # Each trial was recorded at the highest rung below its epoch, in one bracket, whose lowest rung is its first.
    first_rungs = {bracket._rungs[-1][0]: sum(len(r) for _, r in bracket._rungs) for bracket in scheduler._brackets}
    assert list(first_rungs) == [1, 2, 4, 8]
    assert first_rungs[1] > 50 > first_rungs[2] > first_rungs[4] > first_rungs[8]


@pytest.mark.parametrize(
    ("max_epochs", "grace_period", "reduction_factor", "expected"),
    [
        (8, 1, 2.0, 4),
        (9, 1, 2.0, 4),
        (7, 1, 2.0, 3),
        (81, 1, 3.0, 5),
        (243, 1, 3.0, 6),  # int(log(243) / log(3)) is 4: 5 minus a rounding error
        (10, 1, 4.0, 2),
        (8, 8, 2.0, 1),
        (1, 1, 2.0, 1),
        (8, 3, 2.0, 2),
        (8, 1, 1.0001, 8),
    ],
)
def test_hyperband_has_as_many_brackets_as_its_paper_says(
    max_epochs: int, grace_period: int, reduction_factor: float, expected: int
) -> None:
    assert count_brackets(max_epochs, grace_period, reduction_factor) == expected
    scheduler = make_ours(
        "hyperband", max_epochs=max_epochs, grace_period=grace_period, reduction_factor=reduction_factor
    )
    assert len(scheduler._brackets) == expected


def test_brackets_depend_on_no_global_generator_and_leave_it_as_it_was() -> None:
    drawn = []
    for seed in (1, 2):
        with seeded(seed):
            scheduler = make_ours("hyperband")
            expected = np.random.RandomState(seed).random_sample()
            for n in range(30):
                add(scheduler, f"{n}")
            assert np.random.random_sample() == expected  # noqa: NPY002
        drawn.append([scheduler._brackets.index(bracket) for bracket in scheduler._trial_info.values()])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


# A search that goes on


Reports = list[tuple[str, TrialReport | None]]


def note_reports(steps: list[tuple[int, float]], scheduler: Any, reports: Reports) -> None:
    """Let trials report to a scheduler as Tune does, and note what the history would hold of it."""
    trials = {number: add(scheduler, f"{number}") for number in range(8)}
    epochs = dict.fromkeys(range(8), 0)
    over: set[int] = set()
    for number, value in steps:
        if number in over:
            continue
        epochs[number] += 1
        result = make_result(epochs[number], value, status="running", done=False)
        if epochs[number] == 8:  # of its own end, Tune asks no scheduler
            result |= {"status": "completed", "done": True}
        else:
            result["done"] = scheduler.on_trial_result(None, trials[number], dict(result)) == "STOP"
        reports.append((f"{number}", made.as_report(result)))
        if result["done"]:
            over.add(number)
            scheduler.on_trial_complete(None, trials[number], result)
            reports.append((f"{number}", None))


@pytest.mark.parametrize("name", SCHEDULERS)
@given(before=STEPS, after=STEPS)
def test_scheduler_that_goes_on_remembers_and_decides_as_if_it_had_never_been_cut_off(
    name: str, before: list[tuple[int, float]], after: list[tuple[int, float]]
) -> None:
    reports: Reports = []
    straight, resumed = make_ours(name), make_ours(name)
    note_reports(before, straight, reports)
    restore_scheduler(resumed, [f"{number}" for number in range(8)], reports)
    assert remembered(resumed) == remembered(straight)
    for place, (number, value) in enumerate(after):
        result = make_result(number % 7 + 1, value)
        for trial_id in (f"{place % 8}", f"new-{place}"):
            said = {ours.on_trial_result(None, add(ours, trial_id), dict(result)) for ours in (straight, resumed)}
            assert len(said) == 1
    assert remembered(resumed) == remembered(straight)


def remembered(scheduler: Any) -> Any:
    """What a scheduler knows of values, of the last epoch of each trial, and of trials that are to be stopped."""
    rungs, values = memory(scheduler)
    kept = {trial_id: [(r["epoch"], r["val_accuracy"]) for r in results] for trial_id, results in values.items()}
    return rungs, kept, scheduler._seen_epochs, scheduler._to_stop
