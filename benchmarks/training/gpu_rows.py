"""The rows of the suite of ``gpu``: a figure or a check each, and how they are told."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.spread import summarise
from tune_amp.trial.config import described


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuRow:
    """One figure, or one check."""

    part: str = described("part of the suite")
    subject: str = described("what was measured: model, precision, optimizer, batch size")
    quantity: str = described("what the value is")
    value: float | None = described("the figure; a median where it was measured more than once", default=None)
    low: float | None = described("smallest of its measurements, or lower quartile", default=None)
    high: float | None = described("largest of its measurements, or upper quartile", default=None)
    count: int = described("measurements", default=1)
    unit: str = described("of the value", default="")
    verdict: str = described("met or missed, where there is a target; failed, where the part broke", default="")
    note: str = described("target, reason or error", default="")


def summarise_row(values: Sequence[float], **about: Any) -> GpuRow:
    """The row of a figure that was measured several times; ``about`` holds its other fields."""
    spread = summarise(values)
    return GpuRow(value=spread.median, low=spread.low, high=spread.high, count=spread.count, **about)


def render_row(row: GpuRow) -> tuple[str, ...]:
    """Its cells, as Markdown."""
    value = "" if row.value is None else f"{row.value:,.4g} {row.unit}".strip()
    spread = f" ({row.low:,.4g} to {row.high:,.4g})" if row.low is not None and row.high is not None else ""
    return row.part, row.subject, row.quantity, value + spread, row.verdict, row.note


def count_verdicts(rows: Sequence[GpuRow]) -> str:
    """How many of each verdict there are, in words."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("met", "missed", "failed")}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
