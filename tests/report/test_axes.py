"""Values lie where a reader looks for them, and every axis has marks within its ends."""

import math
from pathlib import Path

import pytest
from records import make_trial
from report_runs import write_run

from tune_amp.report.axes import (
    Axis,
    accuracy_axis,
    choice_axis,
    count_step,
    linear_axis,
    log_axis,
    objective_axis,
    power_axis,
    setting_axis,
)
from tune_amp.report.run import load_run
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import load_space
from tune_amp.trial.config import OBJECTIVES, TrialConfig


def check(axis: Axis, *values: float) -> None:
    """Values are on the axis, in order; marks are few, within its ends and as high as they say."""
    places = [axis.place(value) for value in values]
    assert all(place is not None and axis.low <= place <= axis.high for place in places)
    assert 1 <= len(axis.ticks) <= 11
    assert all(axis.low <= position <= axis.high for position, _ in axis.ticks)
    assert [position for position, _ in axis.ticks] == sorted(position for position, _ in axis.ticks)


def test_equal_factors_of_the_error_rate_are_equally_far_apart() -> None:
    axis = accuracy_axis("accuracy", [0.1, 0.96, 0.98, 0.99], 5000)
    check(axis, 0.1, 0.96, 0.98, 0.99)
    first, second, third = (axis.place(value) or math.nan for value in (0.96, 0.98, 0.99))
    assert second - first == pytest.approx(third - second)


def test_a_perfect_accuracy_is_half_an_image_from_the_top() -> None:
    axis = accuracy_axis("accuracy", [0.9, 1.0], 5000)
    check(axis, 0.9, 1.0)
    assert axis.place(1.0) == axis.place(1 - 0.5 / 5000)


def test_accuracies_stay_apart_without_a_number_of_images() -> None:
    axis = accuracy_axis("accuracy", [0.75, 0.9, 1.0], 0)
    check(axis, 0.75, 0.9, 1.0)
    places = [axis.place(value) or math.nan for value in (0.75, 0.9, 1.0)]
    assert places[0] < places[1] < places[2]


@pytest.mark.parametrize("values", [[], [0.97], [0.9700, 0.9702], [0.1, 0.9999], [None, math.nan, 0.5]])
@pytest.mark.parametrize("name", [*OBJECTIVES, "val_f1", "val_distance", "x:max", "val_loss:min"])
def test_any_values_of_an_objective_have_an_axis(name: str, values: list[float | None]) -> None:
    axis = objective_axis(name, values, 5000)
    check(axis, *(value for value in values if value is not None and math.isfinite(value)))
    assert axis.place(None) is None
    assert axis.place(math.inf) is None


@pytest.mark.parametrize("name", ["val_loss:min", "val_distance", "val_r2", "reward:max", "val_gap:min"])
@pytest.mark.parametrize("values", [[-3.0, 0.0, 12.0], [-0.5], [1e17], [-1e299, 1e299]])
def test_a_users_own_metric_may_be_negative_or_large(name: str, values: list[float]) -> None:
    axis = objective_axis(name, values, 0)
    check(axis, *values)
    assert axis.place(1e308) is None


@pytest.mark.parametrize("value", [1e300, 2e-300])
def test_a_loss_may_be_huge_or_tiny(value: float) -> None:
    check(objective_axis("val_loss:min", [value], 0), value)


def test_powers_of_two_have_round_exponents_as_marks() -> None:
    axis = power_axis("scale", [2.0**-20, 2.0**40], str)
    assert [position for position, _ in axis.ticks] == [-16, -8, 0, 8, 16, 24, 32, 40]
    assert axis.place(0.0) is None
    check(power_axis("scale", [65536.0], str), 65536.0)


def test_numbers_from_the_smallest_to_the_largest_have_marks() -> None:
    for low, high in ((1e-4, 3e-2), (1e-12, 1e9), (0.003, 0.003), (0.9, 1.1)):
        check(log_axis("lr", [low, high], str), low, high)
    for low, high in ((0.0, 0.9), (-5.0, 1e6), (0.97, 0.971), (0.0, 0.0)):
        check(linear_axis("decay", [low, high], str), low, high)
    assert log_axis("lr", [1.0], str).place(0.0) is None


def test_choices_stand_side_by_side() -> None:
    axis = choice_axis("precision", ["fp32", "fp16"])
    assert [text for _, text in axis.ticks] == ["fp32", "fp16"]
    assert [axis.place(name) for name in ("fp32", "fp16", "bf16", None)] == [0.0, 1.0, None, None]
    assert choice_axis("own.kind", ["<b>"]).ticks == ((0.0, "&lt;b&gt;"),)  # plotly interprets tags


def test_a_setting_has_the_axis_of_its_space() -> None:
    batch = setting_axis(Parameter(name="batch_size", low=64, high=1024, power_of_two=True), [64, 256])
    assert [text for _, text in batch.ticks] == ["64", "128", "256"]
    scale = setting_axis(Parameter(name="init_scale", low=1.0, high=4.0, power_of_two=True), [1.0, 4.0])
    assert scale.ticks[-1][1] == "2<sup>2</sup>"
    fraction = Parameter(name="growth_interval", low=0.1, high=0.5, fraction_of_trial=True)
    assert setting_axis(fraction, [0.1]).title == "growth_interval / steps of the trial"


def test_whole_numbers_have_whole_steps() -> None:
    assert [count_step(count) for count in (1, 4, 10, 24, 96, 2000)] == [1, 1, 1, 5, 10, 200]


def test_every_trial_of_the_extensions_has_its_place(tmp_path: Path) -> None:
    space = load_space("extensions")
    sampled = space.sample(24, seed=3, train_images=55_000, max_epochs=4)
    trials = [
        make_trial(f"{number:08x}", config=TrialConfig(max_epochs=4, **settings))
        for number, settings in enumerate(sampled)
    ]
    run = load_run(write_run(tmp_path, trials, space_source=space.source, space_text=space.text))
    assert [parameter.name for parameter in run.parameters] == [parameter.name for parameter in space.parameters]
    for parameter in run.parameters:
        found = [run.find_setting(parameter, trial.config) for trial in run.trials]
        assert None not in setting_axis(parameter, found).place_all(found)
        assert set(found) <= set(parameter.choices or found)
        assert len(set(found)) > 1


def test_a_fraction_is_of_the_steps_that_the_space_counts(tmp_path: Path) -> None:
    """The first epochs of a curriculum are shorter, and count in full."""
    run = load_run(write_run(tmp_path))
    [parameter] = [parameter for parameter in run.parameters if parameter.fraction_of_trial]
    interval = round(0.3 * (run.provenance.train_images // 256) * 8)
    config = TrialConfig(precision="fp16", batch_size=256, max_epochs=8, growth_interval=interval, curriculum="linear")
    assert run.find_setting(parameter, config) == pytest.approx(0.3, abs=0.001)
