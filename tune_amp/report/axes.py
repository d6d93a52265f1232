"""The axes of a report's figures, scaled so that the differences that matter are visible.

Every axis is drawn as a linear one, at the positions that ``Axis.place`` returns: plotly has no axis for powers of two,
nor one for accuracies, on which 97 % and 99 % are further apart than 50 % and 52 %.
"""

import dataclasses
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tune_amp.report.style import escape_text
from tune_amp.results.gain import name_objective
from tune_amp.space.parameter import Parameter
from tune_amp.trial.config import is_finite
from tune_amp.trial.objectives import is_maximized, metric_of

MOST_TICKS = 6

LARGEST = 1e300
"""Largest value with a position: beyond it, differences and marks overflow."""

ACCURACY_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale that gives values positions, with its title and ticks."""

    title: str
    place: Callable[[Any], float | None]
    """Function from a value to its position; None if it has none."""
    show: Callable[[Any], str]
    ticks: tuple[tuple[float, str], ...]
    """Positions and their labels."""
    low: float
    high: float
    """Ends of the axis, including a margin."""
    note: str = ""
    """Sentence that explains the scale; empty for a linear one."""

    def place_all(self, values: Iterable[Any]) -> list[float | None]:
        """Return the position of each value."""
        return [self.place(value) for value in values]

    def as_plotly(self, **changes: Any) -> dict[str, Any]:
        """Return the axis as a dict for plotly, updated with ``changes``."""
        return {
            "title": {"text": self.title},
            "tickmode": "array",
            "tickvals": [position for position, _ in self.ticks],
            "ticktext": [text for _, text in self.ticks],
            "range": [self.low, self.high],
            **changes,
        }

    def replace(self, **changes: Any) -> "Axis":
        """Return a copy of the axis with ``changes``."""
        return dataclasses.replace(self, **changes)


def objective_axis(objective: str, values: Iterable[float | None], images: int) -> Axis:
    """Return the axis of an objective.

    Equal distances are equal factors of the error rate for an accuracy, and of the value for any other objective of
    which less is better, if all values are above 0. Every other axis is linear.

    Args:
        objective: see ``trial.objectives``.
        values: the values to show.
        images: number of images that an accuracy was measured on; 0 if that is unknown.
    """
    title, known = objective_title(objective), [value for value in values if is_finite(value)]
    if metric_of(objective) == "val_accuracy":
        return accuracy_axis(title, known, images)
    draw = linear_axis if is_maximized(objective) or min(known, default=0.0) <= 0 else log_axis
    return draw(title, known, lambda value: format_value(objective, value))


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
        return f"{value:.3g} s"
    return f"{value / 2**20:.3g} MiB" if name == "peak_memory_bytes" else f"{value:.4g}"


def accuracy_axis(title: str, values: Sequence[float | None], images: int) -> Axis:
    """Return an axis on which equal steps are equal factors of the error rate, so that the best trials stay apart.

    An error rate is at least half an image; without a known number of ``images``, at least half the smallest other one.
    """
    errors = [1.0 - value for value in values if is_finite(value) and value < 1.0]
    least = 0.5 * (1 / images if images > 0 else min(errors, default=1.0))
    place = _place_by(lambda value: -math.log10(max(1.0 - value, least)))
    low, high = _add_margin([place(value) for value in values])
    ticks = [(position, f"{value:.4g}%") for value, position in _place_percent(place) if low <= position <= high]
    if len(ticks) < 2:
        ticks = [(position, f"{1 - 10**-position:.2%}") for position in _spread(low, high)]
    note = (
        "Equal distances on the axis are equal factors of the error rate: 98% and 99% are as far apart as 96% and 98%."
    )
    return Axis(title=title, place=place, show="{:.2%}".format, ticks=_thin(ticks), low=low, high=high, note=note)


def log_axis(title: str, values: Iterable[float | None], show: Callable[[float], str]) -> Axis:
    """Return a logarithmic axis. Values that are not above 1e-300 have no position."""
    place = _place_by(math.log10, above=1 / LARGEST)
    low, high = _add_margin([place(value) for value in values])
    decades = range(math.floor(low), math.ceil(high) + 1)
    fine = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    within = [value for value in fine if low <= math.log10(value) <= high]
    if len(within) > MOST_TICKS:
        within = [value for value in within if math.log10(value).is_integer()]
    ticks = [(math.log10(value), show(value)) for value in within]
    if len(ticks) < 2:
        ticks = [(position, show(10**position)) for position in _spread(low, high)]
    note = "The axis is logarithmic."
    return Axis(title=title, place=place, show=show, ticks=_thin(ticks), low=low, high=high, note=note)


def power_axis(title: str, values: Iterable[float | None], show: Callable[[float], str]) -> Axis:
    """Return an axis on which powers of two are evenly spaced."""
    place = _place_by(math.log2, above=0.0)
    low, high = _add_margin([place(value) for value in values], least=1.0)
    step = 1
    while high - low > 10 * step:
        step *= 2  # exponents that are themselves round: 0, 8, 16
    lowest, highest = max(low, sys.float_info.min_exp), min(high, sys.float_info.max_exp - 1)
    exponents = range(math.ceil(lowest / step) * step, math.floor(highest) + 1, step)
    ticks = tuple((float(exponent), show(2.0**exponent)) for exponent in exponents)
    return Axis(title=title, place=place, show=show, ticks=ticks, low=low, high=high)


def linear_axis(title: str, values: Iterable[float | None], show: Callable[[float], str]) -> Axis:
    """Return a linear axis."""
    place = _place_by(float)
    low, high = _add_margin([place(value) for value in values])
    step = _round_step((high - low) / 5)
    places = range(math.ceil(low / step), math.floor(high / step) + 1)
    ticks = tuple((index * step, show(index * step)) for index in places)
    return Axis(title=title, place=place, show=show, ticks=ticks, low=low, high=high)


def choice_axis(title: str, choices: Sequence[Any]) -> Axis:
    """Return an axis with the choices side by side."""

    def place(value: Any) -> float | None:
        return float(choices.index(value)) if value in choices else None

    ticks = tuple((float(index), escape_text(str(choice))) for index, choice in enumerate(choices))
    return Axis(title=title, place=place, show=str, ticks=ticks, low=-0.5, high=len(choices) - 0.5)


def setting_axis(parameter: Parameter, values: Iterable[Any]) -> Axis:
    """Return the axis of a searched setting, scaled as in the search space."""
    title = f"{parameter.name} / steps of the trial" if parameter.fraction_of_trial else parameter.name
    if parameter.choices:
        return choice_axis(title, parameter.choices)
    if parameter.power_of_two:
        return power_axis(title, values, _count if parameter.value_type is int else raise_to_power)
    return (log_axis if parameter.log else linear_axis)(title, values, _short)


def count_step(count: int) -> int:
    """Return the distance between ticks of an axis of whole numbers up to ``count``."""
    return math.ceil(_round_step(max(1.0, count / 10)))


def raise_to_power(value: float) -> str:
    """Return a power of two as figures show it."""
    return f"2<sup>{round(math.log2(value))}</sup>"


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:.0f}"


_TITLES: Mapping[str, str] = types.MappingProxyType(
    {
        "test_accuracy": "test accuracy",
        "test_loss": "test loss",
        "train_seconds": "time in training steps",
        "peak_memory_bytes": "peak memory",
    }
)


def _place_by(scale: Callable[[float], float], above: float = -LARGEST) -> Callable[[float | None], float | None]:
    """Return a function from a value to its position; one that is no number, too large or not ``above`` has none."""

    def place(value: float | None) -> float | None:
        return scale(value) if value is not None and above < value <= LARGEST else None

    return place


def _place_percent(place: Callable[[float], float | None]) -> list[tuple[float, float]]:
    placed = ((100 * value, place(value)) for value in ACCURACY_TICKS)
    return [(percent, position) for percent, position in placed if position is not None]


def _add_margin(positions: Iterable[float | None], least: float = 0.0) -> tuple[float, float]:
    """Return the range of ``positions`` with a margin on either side, at least half of ``least``."""
    known = [position for position in positions if position is not None] or [0.0]
    low, high = min(known), max(known)
    margin = max(0.06 * (high - low), least / 2) or max(0.05, 0.001 * abs(low))  # a single value
    return low - margin, high + margin


def _spread(low: float, high: float) -> tuple[float, ...]:
    return tuple(low + share * (high - low) for share in (0.1, 0.5, 0.9))


def _thin(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Return as many ticks as fit, evenly spaced."""
    return tuple(ticks[:: math.ceil(len(ticks) / MOST_TICKS)]) if ticks else ()


def _round_step(step: float) -> float:
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
