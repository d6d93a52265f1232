"""The right trials are chosen, and those that cannot be told apart are called ties."""

import pytest
from records import INF, NAN, make_epoch, make_scored, make_trial

from tune_amp.config import InputError, TrialStatus
from tune_amp.ranking import accuracy_standard_error, choose_best, count_ties
from tune_amp.results import TrialRecord


def ids(trials: list[TrialRecord]) -> str:
    return " ".join(trial.trial_id for trial in trials)


def test_the_best_accuracy_comes_first_and_the_best_loss_on_demand() -> None:
    trials = [make_scored("a", 0.8, 0.1), make_scored("b", 0.9, 0.3), make_scored("c", 0.85, 0.2)]
    assert ids(choose_best(trials, "val_accuracy", 3)) == "b c a"
    assert ids(choose_best(trials, "val_loss", 3)) == "a c b"


@pytest.mark.parametrize(("top_k", "expected"), [(1, "b"), (2, "b c"), (9, "b c a")])
def test_no_more_than_top_k_are_chosen(top_k: int, expected: str) -> None:
    trials = [make_scored("a", 0.8), make_scored("b", 0.9), make_scored("c", 0.85)]
    assert ids(choose_best(trials, "val_accuracy", top_k)) == expected


def test_the_last_epoch_counts_not_the_best() -> None:
    faded = make_trial("faded", epochs=(make_epoch(1, val_accuracy=0.99), make_epoch(2, val_accuracy=0.5)))
    assert ids(choose_best([faded, make_scored("b", 0.9)], "val_accuracy", 2)) == "b faded"


def test_ties_are_broken_by_the_other_score_and_then_by_submission() -> None:
    trials = [make_scored("z", 0.9, 0.2), make_scored("y", 0.9, 0.1), make_scored("a", 0.9, 0.2)]
    assert ids(choose_best(trials, "val_accuracy", 3)) == "y z a"
    trials = [make_scored("z", 0.8, 0.1), make_scored("y", 0.9, 0.1), make_scored("a", 0.8, 0.1)]
    assert ids(choose_best(trials, "val_loss", 3)) == "y z a"


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_a_score_that_is_missing_or_not_finite_is_never_chosen(objective: str) -> None:
    scores = [(NAN, 0.1), (INF, 0.1), (None, 0.1), (0.99, NAN), (0.99, INF), (0.99, -INF), (0.99, None), (None, None)]
    trials = [make_scored(str(i), accuracy, loss) for i, (accuracy, loss) in enumerate(scores)]
    assert ids(choose_best([*trials, make_scored("ok", 0.1, 9.0), make_trial("no", epochs=())], objective, 99)) == "ok"
    assert choose_best(trials, objective, 99) == []


def test_completed_trials_alone_are_chosen_where_there_are_any() -> None:
    stopped = make_scored("stopped", 0.99, status=TrialStatus.STOPPED)
    assert ids(choose_best([stopped, make_scored("done", 0.5)], "val_accuracy", 2)) == "done"


def test_stopped_and_interrupted_trials_are_chosen_where_none_completed_with_a_score() -> None:
    trials = [
        make_scored("stopped", 0.8, status=TrialStatus.STOPPED),
        make_scored("interrupted", 0.9, status=TrialStatus.INTERRUPTED),
        make_scored("nan", NAN, status=TrialStatus.COMPLETED),
    ]
    assert ids(choose_best(trials, "val_accuracy", 9)) == "interrupted stopped"


@pytest.mark.parametrize("status", [TrialStatus.DIVERGED, TrialStatus.OUT_OF_MEMORY, TrialStatus.FAILED])
def test_a_trial_that_broke_is_never_chosen(status: TrialStatus) -> None:
    assert choose_best([make_scored("a", 0.99, status=status)], "val_accuracy", 1) == []


def test_an_unknown_objective_lists_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        choose_best([make_trial()], "accuracy", 1)
    assert str(caught.value) == "objective: must be one of val_accuracy, val_loss, got 'accuracy'"


def test_the_standard_error_is_binomial() -> None:
    assert accuracy_standard_error(0.97, 5_000) == pytest.approx(0.0024125, abs=1e-7)
    assert accuracy_standard_error(0.5, 100) == pytest.approx(0.05)
    assert accuracy_standard_error(1.0, 5_000) == 0


def test_ties_lie_within_two_standard_errors_of_the_difference() -> None:
    # At 97 % of 5,000 images 2 * sqrt(se1^2 + se2^2) is 0.0071; 2 * se1 would be 0.0048, 2 * (se1 + se2) 0.0101.
    first, close, far = make_scored("a", 0.97), make_scored("b", 0.964), make_scored("c", 0.962)
    assert count_ties([first, close, far], 5_000) == 2
    assert count_ties([first, close, far], 500) == 3
    assert count_ties([first, far, far], 5_000) == 1
    assert count_ties([first], 5_000) == 1


def test_perfect_scores_are_ties() -> None:
    assert count_ties([make_scored("a", 1.0), make_scored("b", 1.0), make_scored("c", 0.9)], 5_000) == 2
