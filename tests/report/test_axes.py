"""Values lie where a reader looks for them, and every axis has marks within its ends."""

import math
from pathlib import Path

import pytest
from records import make_trial
from report_runs import write_run

from tune_amp.report.axes import Axis, accuracy_axis, count_ticks, objective_axis, power_axis, setting_axis
from tune_amp.report.run import load_run
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import load_space
from tune_amp.trial.config import OBJECTIVES, TrialConfig


def check(axis: Axis, *values: float) -> None:
    """Values have finite positions, and marks that are ours are few and among the values."""
    places = axis.place_all(values)
    assert all(math.isfinite(place) for place in places)
    if axis.layout.get("type") == "log":
        assert all(place > 0 for place in places)
    ticks = axis.layout.get("tickvals", ())
    assert len(ticks) <= 6
    assert all(min(places) / 1.07 <= tick <= 1.07 * max(places) for tick in ticks if places)


def test_equal_factors_of_the_error_rate_are_equally_far_apart() -> None:
    axis = accuracy_axis("accuracy", [0.1, 0.96, 0.98, 0.99], 5000)
    check(axis, 0.1, 0.96, 0.98, 0.99)
    first, second, third = axis.place_all([0.96, 0.98, 0.99])
    assert second / first == pytest.approx(third / second)
    assert (axis.layout["type"], axis.layout["autorange"]) == ("log", "reversed")
    assert axis.layout["ticktext"] == ["50%", "90%", "97%", "99%"]


def test_a_perfect_accuracy_is_half_an_image_from_the_top() -> None:
    axis = accuracy_axis("accuracy", [0.9, 1.0], 5000)
    check(axis, 0.9, 1.0)
    assert axis.place(1.0) == axis.place(1 - 0.5 / 5000)


@pytest.mark.parametrize(("accuracies", "images"), [([1.0], 180), ([1 - 1 / 180, 1.0], 180), ([1.0, 1.0], 0)])
def test_a_mark_at_a_perfect_accuracy_says_so(accuracies: list[float], images: int) -> None:
    axis = accuracy_axis("accuracy", accuracies, images)
    texts = dict(zip(axis.layout["tickvals"], axis.layout["ticktext"], strict=True))
    assert texts[axis.place(1.0)] == "100.00%"


def test_accuracies_stay_apart_without_a_number_of_images() -> None:
    axis = accuracy_axis("accuracy", [0.75, 0.9, 1.0], 0)
    check(axis, 0.75, 0.9, 1.0)
    assert axis.place_all([0.75, 0.9, 1.0]) == pytest.approx([0.25, 0.1, 0.05])


@pytest.mark.parametrize("values", [[], [0.97], [0.9700, 0.9702], [0.1, 0.9999], [None, math.nan, 0.5]])
@pytest.mark.parametrize("name", [*OBJECTIVES, "val_f1", "val_distance", "x:max", "val_loss:min"])
def test_any_values_of_an_objective_have_an_axis(name: str, values: list[float | None]) -> None:
    axis = objective_axis(name, values, 5000)
    check(axis, *(value for value in values if value is not None and math.isfinite(value)))
    assert axis.place_all([None, math.inf, math.nan]) == [None] * 3


@pytest.mark.parametrize("name", ["val_loss:min", "val_distance", "val_r2", "reward:max", "val_gap:min"])
@pytest.mark.parametrize("values", [[-3.0, 0.0, 12.0], [-0.5], [1e17], [-1e299, 1e299], [1e308], [5e-324, 1e308]])
def test_a_users_own_metric_may_be_negative_huge_or_tiny(name: str, values: list[float]) -> None:
    axis = objective_axis(name, values, 0)
    check(axis, *values)
    assert (axis.layout.get("type") == "log") == (min(values) > 0 and name not in ("val_r2", "reward:max"))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([1e-4, 3e-2], [1e-4, 1e-3, 1e-2]),
        ([0.02, 0.5], [0.02, 0.05, 0.1, 0.2, 0.5]),
        ([0.003, 0.003], [0.003]),
        ([0.9, 1.1], None),
        ([1e-12, 1e9], None),
        ([0.0], [1.0]),
    ],
)
def test_a_logarithmic_axis_has_few_marks(values: list[float], ticks: list[float] | None) -> None:
    layout = setting_axis(Parameter(name="lr", low=1e-12, high=1e9, log=True), values).layout
    assert layout["type"] == "log"
    assert layout.get("tickvals") == (ticks if ticks is None else pytest.approx(ticks))  # plotly's own


def test_powers_of_two_lie_at_their_exponents() -> None:
    axis = power_axis("scale", [2.0**-20, 2.0**40])
    assert axis.place_all([2.0**-20, 2.0**40, 0.0, -1.0, math.inf]) == [-20, 40, None, None, None]
    assert axis.layout["range"] == [-20.5, 40.5]
    assert power_axis("scale", [math.nan]).layout["range"] == [-0.5, 0.5]


def test_a_setting_has_the_axis_of_its_space() -> None:
    batch = setting_axis(Parameter(name="batch_size", low=64, high=1024, power_of_two=True), [64, 256, None])
    assert batch.layout == {"type": "log", "dtick": math.log10(2), "tickformat": "d"}
    scale = setting_axis(Parameter(name="init_scale", low=1.0, high=4.0, power_of_two=True), [1.0, 4.0])
    assert scale.layout == {"range": [-0.5, 2.5], "tickprefix": "2<sup>", "ticksuffix": "</sup>", "dtick": 1}
    choice = setting_axis(Parameter(name="precision", choices=("fp32", "fp16")), ["fp16"])
    assert choice.layout["categoryarray"] == ["fp32", "fp16"]
    own = setting_axis(Parameter(name="own.kind", choices=("<b>", 2)), ["<b>"])
    assert own.layout["categoryarray"] == own.place_all(["<b>", 2]) == ["&lt;b&gt;", "2"]  # plotly interprets tags
    clip = setting_axis(Parameter(name="grad_clip", choices=(None, 1.0)), [None, 1.0])
    assert clip.layout["categoryarray"] == clip.place_all([None, 1.0]) == ["null", "1.0"]
    fraction = Parameter(name="growth_interval", low=0.1, high=0.5, fraction_of_trial=True)
    assert setting_axis(fraction, [0.1]).title == "growth_interval / steps of the trial"


def test_whole_numbers_have_whole_steps() -> None:
    assert [count_ticks(count) for count in (1, 10, 11, 2000)] == [{"dtick": 1}, {"dtick": 1}, {}, {}]


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
