"""Objectives: names of metrics with a direction, which the name implies or the user gives."""

import pytest
from records import make_epoch

from tune_amp.trial.config import OBJECTIVES, InputError
from tune_amp.trial.objectives import guess_mode, is_maximized, metric_of, read_objectives, show_value


@pytest.mark.parametrize(("name", "mode"), [
    ("val_accuracy", "max"), ("val_loss", "min"), ("train_seconds", "min"), ("peak_memory_bytes", "min"),
    ("val_f1", "max"), ("f1_macro", "max"), ("val_dice", "max"), ("return", "max"), ("val_mae", "min"),
    ("perplexity", "min"), ("loss_precision", "max"), ("val_reading", None), ("mapping", None), ("lossy", None),
])  # fmt: skip
def test_a_word_of_the_name_implies_the_direction(name: str, mode: str | None) -> None:
    assert guess_mode(name) == mode


def test_a_direction_after_a_colon_counts_before_that_of_the_name() -> None:
    assert is_maximized("val_f1")
    assert not is_maximized("val_f1:min")
    assert is_maximized("val_loss:max")
    assert metric_of("val_loss:max") == "val_loss"
    assert metric_of("val_loss") == "val_loss"


@pytest.mark.parametrize(("text", "mode", "expected"), [
    ("val_f1", None, "val_f1"), ("val_f1", "max", "val_f1"), ("val_f1", "min", "val_f1:min"),
    ("val_f1:max", None, "val_f1"), ("x", "max", "x:max"), ("x:min", None, "x:min"),
    ("x , val_loss", "max", "x:max,val_loss"), ("val_mae,x:max,train_seconds", None, None),
])  # fmt: skip
def test_objectives_have_a_direction_only_if_the_name_implies_another(
    text: str, mode: str | None, expected: str | None
) -> None:
    assert read_objectives("--objective", text, mode) == (expected or text)


@pytest.mark.parametrize(("text", "message"), [
    ("val/f1", "--objective: must be names of letters, digits and _, joined by commas, got 'val/f1'"),
    ("", "--objective: must be names of letters, digits and _, joined by commas, got ''"),
    ("x:up", "--objective: must end with :max or :min, if with a direction, got 'x:up'"),
    ("x:", "--objective: must end with :max or :min, if with a direction, got 'x:'"),
    ("f1,f1:min", "--objective: must name none twice, got 'f1,f1:min'"),
    ("epoch:max", "--objective: must be no name of another column, got 'epoch:max'"),
    ("x,val_loss", "--objective: 'x' does not say whether more is better: write x:max or x:min"),
    ("test_f1", "--objective: must be no metric of the test set, which chooses nothing, got 'test_f1'"),
    ("x", "--objective: 'x' does not say whether more is better: add --mode max or --mode min"),
])  # fmt: skip
def test_a_bad_objective_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_objectives("--objective", text, None)
    assert str(caught.value) == message


def test_built_in_objectives_say_their_direction() -> None:
    assert [is_maximized(name) for name in OBJECTIVES] == [True, False, False, False]


def test_a_value_is_found_among_the_common_and_the_own_metrics() -> None:
    epoch = make_epoch(1, val_loss=0.5, metrics={"val_f1": 0.25})
    assert epoch.find_value("val_loss:max") == 0.5
    assert epoch.find_value("val_f1") == 0.25
    assert epoch.find_value("val_dice") is None


def test_an_unknown_metric_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        read_objectives("--objective", "f1", None, OBJECTIVES)
    rule = f"must be one of {', '.join(OBJECTIVES)}, or several joined by commas"
    assert str(caught.value) == f"--objective: {rule}; a metric of your own needs --task or --train, got 'f1'"


def test_accuracies_are_shown_as_percentages() -> None:
    assert show_value("val_accuracy", 0.98765) == "98.77 %"
    assert show_value("val_f1", 0.987654321) == "0.98765"
    assert show_value("val_loss:min", 123456.7) == "1.2346e+05"
