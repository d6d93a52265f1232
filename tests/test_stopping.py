import math
import types
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler

from tune_amp.config import OBJECTIVES
from tune_amp.stopping import WORST_VALUES, DivergenceAwareASHA, objective_mode

NAN, INF = math.nan, math.inf
SETTINGS: dict[str, Any] = {"grace_period": 1, "reduction_factor": 2}


def make_ours(objective: str = "val_accuracy", max_epochs: int = 8, **settings: Any) -> Any:
    return DivergenceAwareASHA(objective=objective, max_epochs=max_epochs, **SETTINGS | settings)


def make_stock(objective: str = "val_accuracy", max_epochs: int = 8, **settings: Any) -> Any:
    mode = objective_mode(objective)
    return ASHAScheduler(time_attr="epoch", metric=objective, mode=mode, max_t=max_epochs, **SETTINGS | settings)


def make_result(epoch: int, value: float, objective: str = "val_accuracy", **changes: Any) -> dict[str, Any]:
    return {"train_loss": 0.5, "val_loss": 0.5, "val_accuracy": 0.5, "epoch": epoch, objective: value} | changes


def add(scheduler: Any, trial_id: str) -> Any:
    trial = types.SimpleNamespace(trial_id=trial_id)
    scheduler.on_trial_add(None, trial)
    return trial


def decide(scheduler: Any, results: Sequence[dict[str, Any]]) -> list[str]:
    """What the scheduler says to each result, every one from a trial of its own."""
    return [scheduler.on_trial_result(None, add(scheduler, f"{n:08x}"), result) for n, result in enumerate(results)]


def rung(scheduler: Any, milestone: int) -> dict[str, float]:
    [bracket] = scheduler._brackets
    return dict(next(recorded for at, recorded in bracket._rungs if at == milestone))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stock_asha_never_stops_a_trial_whose_metric_is_nan_and_ours_does(objective: str) -> None:
    good = {"val_accuracy": 0.9, "val_loss": 0.2}[objective]
    results = [make_result(1, good, objective), make_result(1, NAN, objective)]
    # Ray's fault. Should this half fail, Ray has mended it, and our repair may be superfluous.
    assert decide(make_stock(objective), results) == ["CONTINUE", "CONTINUE"]
    assert decide(make_ours(objective), results) == ["CONTINUE", "STOP"]


def test_stock_asha_gives_a_nan_trial_the_full_budget_and_ours_stops_it_at_the_first_rung() -> None:
    for make, expected in ((make_stock, "CONTINUE" * 7 + "STOP"), (make_ours, "STOP")):
        scheduler = make()
        healthy, diverged = add(scheduler, "healthy"), add(scheduler, "diverged")
        said = ""
        for epoch in range(1, 9):
            scheduler.on_trial_result(None, healthy, make_result(epoch, 0.9))
            said += scheduler.on_trial_result(None, diverged, make_result(epoch, NAN))
            if said.endswith("STOP"):
                break
        assert said == expected


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_diverged_trial_counts_as_worst_in_the_percentile_of_its_rung(objective: str, value: float) -> None:
    better, middling = {"val_accuracy": (0.9, 0.5), "val_loss": (0.1, 0.5)}[objective]
    diverged_first = [make_result(1, value, objective), make_result(1, better, objective)]
    scheduler = make_ours(objective)
    decide(scheduler, diverged_first)
    sign = {"val_accuracy": 1, "val_loss": -1}[objective]
    assert sorted(rung(scheduler, 1).values()) == [sign * WORST_VALUES[objective], sign * better]
    # The cutoff is the median of the worst and a good one, which a middling trial exceeds.
    assert decide(make_ours(objective), [*diverged_first, make_result(1, middling, objective)])[-1] == "CONTINUE"


def test_stock_asha_measures_the_others_without_the_diverged_trial_and_ours_with_it() -> None:
    results = [make_result(1, 0.9), make_result(1, NAN), make_result(1, 0.5)]
    assert decide(make_stock(), results)[-1] == "STOP"  # the cutoff is the only finite one, 0.9
    assert decide(make_ours(), results)[-1] == "CONTINUE"  # the cutoff is the median of 0 and 0.9


@pytest.mark.parametrize("losses", [{"val_loss": NAN}, {"train_loss": NAN}, {"train_loss": INF}])
def test_trial_with_a_loss_that_is_not_finite_ranks_last_however_good_its_accuracy(losses: dict[str, Any]) -> None:
    scheduler = make_ours()
    decisions = decide(scheduler, [make_result(1, 0.3), make_result(1, 0.99, **losses)])
    assert decisions == ["CONTINUE", "STOP"]
    assert sorted(rung(scheduler, 1).values()) == [0.0, 0.3]


def test_trial_with_a_collapsed_scale_ranks_last_although_its_losses_are_finite() -> None:
    scheduler = make_ours()
    diverged = make_result(1, 0.99, status="diverged")
    assert decide(scheduler, [make_result(1, 0.3, status="running"), diverged]) == ["CONTINUE", "STOP"]
    assert sorted(rung(scheduler, 1).values()) == [0.0, 0.3]
    trial = add(scheduler, "ended")
    scheduler.on_trial_complete(None, trial, make_result(2, 0.99, status="diverged"))
    assert rung(scheduler, 2) == {"ended": 0.0}


def test_end_of_a_diverged_trial_is_recorded_as_the_worst_of_its_rung() -> None:
    scheduler = make_ours("val_loss")
    trial = add(scheduler, "diverged")
    scheduler.on_trial_complete(None, trial, make_result(2, NAN, "val_loss"))
    assert rung(scheduler, 2) == {"diverged": -1e9}
    assert rung(scheduler, 1) == {}
    # -1e9 and a good loss: the next is not dragged below the cutoff by an infinite or NaN interpolation.
    assert decide(scheduler, [make_result(2, 0.1, "val_loss"), make_result(2, 0.3, "val_loss")])[-1] == "CONTINUE"


def test_result_is_not_changed_for_those_who_read_it_next() -> None:
    result = make_result(1, NAN)
    decide(make_ours(), [result])
    assert math.isnan(result["val_accuracy"])


@given(
    objective=st.sampled_from(OBJECTIVES),
    max_epochs=st.integers(1, 9),
    grace_period=st.integers(1, 9),
    reduction_factor=st.sampled_from([1.5, 2.0, 3.0, 4.0]),
    histories=st.lists(st.lists(st.floats(0, 3), min_size=1, max_size=9), min_size=1, max_size=12),
)
def test_decisions_on_finite_results_are_those_of_stock_asha(
    objective: str, max_epochs: int, grace_period: int, reduction_factor: float, histories: list[list[float]]
) -> None:
    settings = {"grace_period": min(grace_period, max_epochs), "reduction_factor": reduction_factor}
    ours = make_ours(objective, max_epochs, **settings)
    stock = make_stock(objective, max_epochs, **settings)
    trials = [(add(ours, f"{n}"), add(stock, f"{n}")) for n in range(len(histories))]
    stopped = set()
    for epoch in range(1, max_epochs + 1):
        for number, history in enumerate(histories):
            if number in stopped or epoch > len(history):
                continue
            result = make_result(epoch, history[epoch - 1], objective)
            ours_said = ours.on_trial_result(None, trials[number][0], result)
            assert ours_said == stock.on_trial_result(None, trials[number][1], result)
            if ours_said == "STOP":
                stopped.add(number)
                ours.on_trial_complete(None, trials[number][0], result)
                stock.on_trial_complete(None, trials[number][1], result)
    assert [bracket._rungs for bracket in ours._brackets] == [bracket._rungs for bracket in stock._brackets]


def test_report_of_a_failure_without_an_epoch_changes_nothing() -> None:
    scheduler = make_ours()
    failed = add(scheduler, "failed")
    report = {"val_accuracy": NAN, "val_loss": NAN, "status": "failed", "done": True}
    assert scheduler.on_trial_result(None, failed, report) == "CONTINUE"
    scheduler.on_trial_complete(None, failed, report)
    assert rung(scheduler, 1) == {}
    assert decide(scheduler, [make_result(1, 0.1), make_result(1, 0.05)]) == ["CONTINUE", "STOP"]


def test_full_budget_ends_a_trial() -> None:
    scheduler = make_ours(max_epochs=3)
    assert decide(scheduler, [make_result(3, 0.9)]) == ["STOP"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_worst_value_is_worse_than_any_that_training_can_report(objective: str) -> None:
    possible = {"val_accuracy": 0.001, "val_loss": 1e6}[objective]
    better = max if objective_mode(objective) == "max" else min
    assert better(possible, WORST_VALUES[objective]) == possible
    assert math.isfinite(WORST_VALUES[objective])  # ASHA interpolates
