"""A figure that was measured several times: its median, and how far the measurements lie apart."""

import dataclasses
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with its range."""

    median: float
    low: float
    high: float
    count: int


def summarise(values: Sequence[float]) -> Spread:
    """Median, smallest, largest and number of ``values``."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values), count=len(values))


def render_spread(values: Sequence[float], form: str) -> str:
    """``12.0 ms (11.0 ms to 14.0 ms)``; a single value has no range.

    Args:
        values: in the unit that ``form`` writes.
        form: of one figure, as ``str.format`` takes it.
    """
    spread = summarise(values)
    median, low, high = (form.format(value) for value in (spread.median, spread.low, spread.high))
    return median if spread.count == 1 else f"{median} ({low} to {high})"
