"""The axes of a report's figures, scaled so that the differences that matter are visible.

plotly chooses ranges and ticks, except on the two scales that it lacks: accuracies, of which 97 % and 99 % are further
apart than 50 % and 52 %, are drawn as error rates, and powers of two as their exponents.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tune_amp.report.style import escape_text
from tune_amp.results.gain import name_objective
from tune_amp.space.parameter import Parameter
from tune_amp.trial.config import is_finite
from tune_amp.trial.objectives import is_maximized, metric_of
from tune_amp.trial.text import format_number

MOST_TICKS = 6

ACCURACY_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)

_TITLES: Mapping[str, str] = types.MappingProxyType(
    {
        "test_accuracy": "test accuracy",
        "test_loss": "test loss",
        "train_seconds": "time in training steps",
        "peak_memory_bytes": "peak memory",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale that gives values positions on one of plotly's axes."""

    title: str
    layout: Mapping[str, Any]
    """Type, ticks and range of plotly's axis, where they are not plotly's own."""
    place: Callable[[Any], Any] = lambda value: value
    """Function from a value to its position on plotly's axis; None if it has none."""
    note: str = ""
    """Sentence that explains the scale; empty for a linear one."""
    unset: Any = None
    """Position of a setting that is null; None if null is no choice."""

    def place_all(self, values: Iterable[Any]) -> list[Any]:
        """Return the position of each value; that of ``unset`` for one that is no finite number."""
        return [self.place(value) if isinstance(value, str) or is_finite(value) else self.unset for value in values]

    def as_plotly(self, **changes: Any) -> dict[str, Any]:
        """Return the axis as a dict for plotly, updated with ``changes``."""
        return {"title": self.title, **self.layout, **changes}


def objective_axis(objective: str, values: Iterable[float | None], images: int) -> Axis:
    """Return the axis of an objective.

    Equal distances are equal factors of the error rate for an accuracy, and of the value for any other objective of
    which less is better, if all values are above 0. Every other axis is linear.

    Args:
        objective: see ``trial.objectives``.
        values: the values to show.
        images: number of images that an accuracy was measured on; 0 if that is unknown.
    """
    known = [value for value in values if is_finite(value)]
    if metric_of(objective) == "val_accuracy":
        return accuracy_axis(objective_title(objective), known, images)
    axis = linear_axis(objective)
    if is_maximized(objective) or min(known, default=0.0) <= 0:
        return axis
    return dataclasses.replace(
        axis, layout={**axis.layout, **_choose_log_ticks(axis.place_all(known))}, note="The axis is logarithmic."
    )


def linear_axis(objective: str) -> Axis:
    """Return the linear axis of an objective or of its counterpart on the test set."""
    title = objective_title(objective)
    match metric_of(objective):
        case "val_accuracy" | "test_accuracy":
            return Axis(title=title, layout={"tickformat": ".2%"})
        case "peak_memory_bytes":
            return Axis(title=title, layout={"ticksuffix": " MiB"}, place=lambda value: value / 2**20)
        case name:
            return Axis(
                title=title, layout={"tickformat": ",.4~g", "ticksuffix": " s" if name == "train_seconds" else ""}
            )


def objective_title(objective: str) -> str:
    """Return an objective, or its counterpart on the test set, in words."""
    return _TITLES.get(metric_of(objective), name_objective(metric_of(objective)))


def format_value(objective: str, value: float | None) -> str:
    """Return a value of an objective with its unit; empty for None."""
    name = metric_of(objective)
    if value is None:
        return ""
    if name in ("val_accuracy", "test_accuracy"):
        return f"{value:.2%}"
    if name == "train_seconds":
        return f"{format_number(value, 3)} s"
    return f"{format_number(value / 2**20, 3)} MiB" if name == "peak_memory_bytes" else format_number(value, 4)


def accuracy_axis(title: str, accuracies: Sequence[float], images: int) -> Axis:
    """Return an axis on which equal steps are equal factors of the error rate, so that the best trials stay apart.

    An error rate is at least half an image; without a known number of ``images``, at least half the smallest other one.
    """
    least = 0.5 * (1 / images if images > 0 else min((1 - value for value in accuracies if value < 1), default=1.0))
    errors = [max(1 - value, least) for value in accuracies] or [1.0]
    ticks = {1 - value: f"{100 * value:.4g}%" for value in ACCURACY_TICKS if min(errors) <= 1 - value <= max(errors)}
    if len(ticks) < 2:
        low, high = min(errors), max(errors)
        ticks = {error: f"{1 if error == least else 1 - error:.2%}" for error in (high, math.sqrt(low * high), low)}
    shown = [*ticks][:: math.ceil(len(ticks) / MOST_TICKS)]
    return Axis(
        title=title,
        layout={
            "type": "log",
            "autorange": "reversed",
            "tickvals": shown,
            "ticktext": [ticks[error] for error in shown],
        },
        place=lambda value: max(1 - value, least),
        note="Equal distances on the axis are equal factors of the error rate: 98% and 99% are as far apart as 96% and "
        "98%.",
    )


def power_axis(title: str, values: Iterable[float | None]) -> Axis:
    """Return an axis on which powers of two are evenly spaced; values that are not above 0 have no position."""
    known = [math.log2(value) for value in values if is_finite(value) and value > 0] or [0.0]
    low, high = min(known) - 0.5, max(known) + 0.5
    return Axis(
        title=title,
        layout={"range": [low, high], "tickprefix": "2<sup>", "ticksuffix": "</sup>", **count_ticks(high - low)},
        place=lambda value: math.log2(value) if value > 0 else None,
    )


def setting_axis(parameter: Parameter, values: Iterable[Any]) -> Axis:
    """Return the axis of a searched setting, scaled as in the search space."""
    title = f"{parameter.name} / steps of the trial" if parameter.fraction_of_trial else parameter.name
    if parameter.choices:
        labels = {choice: escape_text("null" if choice is None else str(choice)) for choice in parameter.choices}
        layout = {"type": "category", "categoryarray": [*labels.values()], "range": [-0.5, len(labels) - 0.5]}
        return Axis(title=title, layout=layout, place=labels.get, unset=labels.get(None))
    if parameter.power_of_two and parameter.value_type is float:
        return power_axis(title, values)
    if parameter.power_of_two:
        known = [value for value in values if is_finite(value) and value > 0] or [1]
        step = max(1, math.ceil(math.log2(max(known) / min(known)) / 10))
        return Axis(title=title, layout={"type": "log", "dtick": step * math.log10(2), "tickformat": "d"})
    return Axis(title=title, layout={"tickformat": ",.6~g", **(_choose_log_ticks(values) if parameter.log else {})})


def count_ticks(count: float) -> dict[str, float]:
    """Return the ticks of an axis of ``count`` whole numbers: plotly's own would be fractions on a short one."""
    return {"dtick": 1} if count <= 10 else {}


def _choose_log_ticks(values: Iterable[float | None]) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis: plotly's own are so many on one to three decades that they overlap."""
    known = [value for value in values if is_finite(value) and value > 0]
    low, high = min(known, default=1.0), max(known, default=1.0)
    if low == high:
        return {"type": "log", "tickvals": [low]}
    decades = [10.0**exponent for exponent in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
    for digits in ((1, 2, 5), (1,)):
        ticks = [
            digit * decade for decade in decades for digit in digits if low / 1.06 <= digit * decade <= 1.06 * high
        ]
        if 2 <= len(ticks) < MOST_TICKS:
            return {"type": "log", "tickvals": ticks}
    return {"type": "log"}
