"""The right trials are chosen, and those that cannot be told apart are called ties."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import INF, NAN, make_epoch, make_scored, make_trial

from tune_amp.results.ranking import accuracy_standard_error, choose_best, count_ties
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import OBJECTIVES, InputError, TrialConfig, TrialStatus


def ids(trials: list[TrialRecord]) -> str:
    return " ".join(trial.trial_id for trial in trials)


def test_the_best_accuracy_comes_first_and_the_best_loss_on_demand() -> None:
    trials = [make_scored("a", 0.8, 0.1), make_scored("b", 0.9, 0.3), make_scored("c", 0.85, 0.2)]
    assert ids(choose_best(trials, ["val_accuracy"], 3)) == "b c a"
    assert ids(choose_best(trials, ["val_loss"], 3)) == "a c b"


@pytest.mark.parametrize(("top_k", "expected"), [(1, "b"), (2, "b c"), (9, "b c a")])
def test_no_more_than_top_k_are_chosen(top_k: int, expected: str) -> None:
    trials = [make_scored("a", 0.8), make_scored("b", 0.9), make_scored("c", 0.85)]
    assert ids(choose_best(trials, ["val_accuracy"], top_k)) == expected


def test_the_last_epoch_counts_not_the_best() -> None:
    faded = make_trial("faded", epochs=(make_epoch(1, val_accuracy=0.99), make_epoch(2, val_accuracy=0.5)))
    assert ids(choose_best([faded, make_scored("b", 0.9)], ["val_accuracy"], 2)) == "b faded"


def test_ties_are_broken_by_the_other_score_and_then_by_submission() -> None:
    trials = [make_scored("z", 0.9, 0.2), make_scored("y", 0.9, 0.1), make_scored("a", 0.9, 0.2)]
    assert ids(choose_best(trials, ["val_accuracy"], 3)) == "y z a"
    trials = [make_scored("z", 0.8, 0.1), make_scored("y", 0.9, 0.1), make_scored("a", 0.8, 0.1)]
    assert ids(choose_best(trials, ["val_loss"], 3)) == "y z a"


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_a_score_that_is_missing_or_not_finite_is_never_chosen(objective: str) -> None:
    scores = [(NAN, 0.1), (INF, 0.1), (None, 0.1), (0.99, NAN), (0.99, INF), (0.99, -INF), (0.99, None), (None, None)]
    trials = [make_scored(str(i), accuracy, loss) for i, (accuracy, loss) in enumerate(scores)]
    assert (
        ids(choose_best([*trials, make_scored("ok", 0.1, 9.0), make_trial("no", epochs=())], [objective], 99)) == "ok"
    )
    assert choose_best(trials, [objective], 99) == []


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        (["val_accuracy"], "stopped interrupted done worse"),  # more epochs would rarely make them worse
        (["val_loss"], "done"),  # they might
        (["val_accuracy", "train_seconds"], "done"),  # they would have cost more
    ],
)
def test_trials_that_ended_early_are_chosen_beside_completed_ones_by_accuracy_alone(
    objectives: list[str], expected: str
) -> None:
    trials = [
        make_scored("worse", 0.4, 0.8, status=TrialStatus.STOPPED),
        make_scored("interrupted", 0.6, status=TrialStatus.INTERRUPTED),
        make_scored("done", 0.5),
        make_scored("stopped", 0.7, status=TrialStatus.STOPPED),
    ]
    assert ids(choose_best(trials, objectives, 9)) == expected


def test_stopped_and_interrupted_trials_are_chosen_where_none_completed_with_a_score() -> None:
    trials = [
        make_scored("stopped", 0.8, status=TrialStatus.STOPPED),
        make_scored("interrupted", 0.9, status=TrialStatus.INTERRUPTED),
        make_scored("nan", NAN, status=TrialStatus.COMPLETED),
    ]
    assert ids(choose_best(trials, ["val_accuracy"], 9)) == "interrupted stopped"


@pytest.mark.parametrize("status", [TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY, TrialStatus.FAILED])
def test_a_trial_that_broke_is_never_chosen(status: TrialStatus) -> None:
    assert choose_best([make_scored("a", 0.99, status=status)], ["val_accuracy"], 1) == []


def make_measured(name: str, value: float, **changes: Any) -> TrialRecord:
    """A trial of a user's own loop, which reports neither accuracy nor loss."""
    own = make_epoch(1, val_accuracy=None, val_loss=None, metrics={"reading": value})
    return make_trial(name, epochs=(own,), **changes)


@pytest.mark.parametrize(("objective", "expected"), [("reading:max", "bca"), ("reading:min", "acb")])
def test_a_metric_of_the_user_s_own_ranks_by_its_direction(objective: str, expected: str) -> None:
    trials = [make_measured("a", 1.0), make_measured("b", 3.0), make_measured("c", 2.0), make_measured("d", NAN)]
    assert [trial.trial_id for trial in choose_best(trials, [objective], 3)] == list(expected)


def test_a_trial_without_a_loss_that_others_have_is_ranked_by_its_objective() -> None:
    other = make_epoch(1, val_accuracy=None, val_loss=1.0, metrics={"reading": 1.0})
    config = TrialConfig(train="mine:train")
    trials = [make_trial("worse", epochs=(other,), config=config), make_measured("better", 2.0, config=config)]
    assert [trial.trial_id for trial in choose_best(trials, ["reading:max"], 2)] == ["better", "worse"]


def test_a_trial_that_does_not_report_the_objective_is_not_ranked() -> None:
    assert choose_best([make_trial(), make_measured("a", 1.0)], ["another"], 2) == []


# Several objectives


FAST = ("val_accuracy", "train_seconds")


def make_timed(trial_id: str, accuracy: float, seconds: float, **changes: Any) -> TrialRecord:
    epoch = {"val_accuracy": accuracy, "train_seconds": seconds, "val_loss": 0.1, "peak_memory_bytes": None}
    status = changes.pop("status", TrialStatus.COMPLETED)
    return make_trial(trial_id, status=status, epochs=(make_epoch(1, **epoch | changes),))


def test_several_objectives_give_all_trials_that_no_other_dominates_the_most_accurate_first() -> None:
    trials = [
        make_timed("fast", 0.8, 1.0),
        make_timed("dominated", 0.85, 5.0),
        make_timed("accurate", 0.95, 9.0),
        make_timed("between", 0.9, 4.0),
    ]
    assert ids(choose_best(trials, FAST, 1)) == "accurate between fast"  # top_k does not cut the set


def test_equal_in_one_objective_and_better_in_another_dominates() -> None:
    trials = [make_timed("slower", 0.9, 2.0), make_timed("faster", 0.9, 1.0), make_timed("worse", 0.8, 1.0)]
    assert ids(choose_best(trials, FAST, 9)) == "faster"


def test_trials_with_the_same_values_are_all_kept_by_loss_and_then_by_submission() -> None:
    losses = {"z": 0.2, "y": 0.1, "x": 0.2}
    trials = [make_timed(trial_id, 0.9, 1.0, val_loss=loss) for trial_id, loss in losses.items()]
    assert ids(choose_best(trials, FAST, 1)) == "y z x"


@pytest.mark.parametrize("objectives", list(itertools.permutations(OBJECTIVES, 2)))
def test_more_accuracy_is_better_and_less_of_everything_else(objectives: tuple[str, str]) -> None:
    good = {"val_accuracy": 0.9, "val_loss": 0.1, "train_seconds": 1.0, "peak_memory_bytes": 10}
    bad = {"val_accuracy": 0.8, "val_loss": 0.2, "train_seconds": 2.0, "peak_memory_bytes": 20}
    first, second = objectives
    values = {"second": good | {first: bad[first]}, "neither": bad, "first": good | {second: bad[second]}}
    trials = [make_trial(trial_id, epochs=(make_epoch(1, **of_trial),)) for trial_id, of_trial in values.items()]
    assert ids(choose_best(trials, objectives, 1)) == "first second"


@pytest.mark.parametrize(
    "broken",
    [{"val_accuracy": NAN}, {"val_loss": NAN}, {"val_loss": None}, {"train_seconds": INF}, {"train_seconds": NAN}],
)
def test_trial_with_a_value_that_is_not_finite_is_in_no_pareto_set(broken: dict[str, float]) -> None:
    values = {"accuracy": 0.99, "seconds": 0.1} | broken
    trials = [make_timed("broken", **values), make_timed("ok", 0.1, 9.0)]
    assert ids(choose_best(trials, FAST, 9)) == "ok"


def test_trial_whose_memory_was_not_measured_is_in_no_pareto_set_by_memory() -> None:
    trials = [make_timed("unmeasured", 0.9, 1.0), make_timed("measured", 0.8, 1.0, peak_memory_bytes=2**40)]
    assert ids(choose_best(trials, ["val_accuracy", "peak_memory_bytes"], 1)) == "measured"
    assert ids(choose_best(trials, FAST, 1)) == "unmeasured"


def test_pareto_set_is_of_completed_trials_where_there_are_any() -> None:
    stopped = [make_timed(i, 0.99, 0.1, status=status) for i, status in (("s", "stopped"), ("i", "interrupted"))]
    broken = [make_timed(status, 0.99, 0.1, status=TrialStatus(status)) for status in ("diverged", "failed")]
    assert ids(choose_best([*stopped, *broken, make_timed("done", 0.5, 9.0)], FAST, 9)) == "done"
    assert ids(choose_best([*stopped, *broken], FAST, 9)) == "s i"
    assert choose_best(broken, FAST, 9) == []


@given(
    objectives=st.permutations(OBJECTIVES).flatmap(lambda names: st.sampled_from([names[:2], names[:3], names])),
    values=st.lists(st.tuples(*[st.integers(0, 4)] * 4), max_size=20),
)
def test_pareto_set_is_that_of_its_definition(objectives: list[str], values: list[tuple[int, ...]]) -> None:
    trials = [
        make_timed(f"{n}", accuracy / 4, float(seconds), val_loss=float(loss), peak_memory_bytes=memory)
        for n, (accuracy, loss, seconds, memory) in enumerate(values)
    ]

    def cost(trial: TrialRecord, objective: str) -> float:
        value: float = getattr(trial.last, objective)
        return 1 - value if objective == "val_accuracy" else value

    def dominates(better: TrialRecord, other: TrialRecord) -> bool:
        pairs = [(cost(better, objective), cost(other, objective)) for objective in objectives]
        return all(ours <= theirs for ours, theirs in pairs) and any(ours < theirs for ours, theirs in pairs)

    chosen = choose_best(trials, objectives, 1)
    expected = {trial.trial_id for trial in trials if not any(dominates(other, trial) for other in trials)}
    assert {trial.trial_id for trial in chosen} == expected
    assert len(chosen) == len(expected)
    firsts = [cost(trial, objectives[0]) for trial in chosen]
    assert firsts == sorted(firsts)


# Ties


def test_the_standard_error_is_binomial() -> None:
    assert accuracy_standard_error(0.97, 5_000) == pytest.approx(0.0024125, abs=1e-7)
    assert accuracy_standard_error(0.5, 100) == pytest.approx(0.05)
    assert accuracy_standard_error(1.0, 5_000) == 0


@pytest.mark.parametrize(
    ("accuracy", "images", "message"),
    [
        (97.0, 5_000, r"^val_accuracy: must be between 0 and 1, got 97\.0$"),
        (0.9, -1, "^validation_images: must be at l"),
    ],
)
def test_an_accuracy_that_cannot_be_is_refused_in_one_line(accuracy: float, images: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        accuracy_standard_error(accuracy, images)


def test_ties_lie_within_two_standard_errors_of_the_difference() -> None:
    # At 97 % of 5,000 images 2 * sqrt(se1^2 + se2^2) is 0.0071; 2 * se1 would be 0.0048, 2 * (se1 + se2) 0.0101.
    first, close, far = make_scored("a", 0.97), make_scored("b", 0.964), make_scored("c", 0.962)
    assert count_ties([first, close, far], 5_000) == 2
    assert count_ties([first, close, far], 500) == 3
    assert count_ties([first, far, far], 5_000) == 1
    assert count_ties([first], 5_000) == 1


def test_perfect_scores_are_ties() -> None:
    assert count_ties([make_scored("a", 1.0), make_scored("b", 1.0), make_scored("c", 0.9)], 5_000) == 2
