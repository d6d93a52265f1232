"""The loss scale of every trial, step by step, with a mark at every overflow, which is a lost training step.

``epochs.parquet`` holds each change of the scale with the first step at the new scale. ``GradScaler`` lowers the scale
only after a gradient overflowed, and skips that step: a decrease at step n is an overflow in step n - 1.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.report.axes import Axis, count_step, power_axis, raise_to_power
from tune_amp.report.run import Run
from tune_amp.report.style import build_figure, colour_of, describe_trial, style_line
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrialStatus, format_scale

# The first steps have their own panel: in them, a scale that starts too high comes down, one step at a time.
FEWEST_FIRST_STEPS, MOST_FIRST_STEPS = 20, 64

# Columns of the figure for scales and for marks: if a trial overflows at every other step, no more can be seen.
COLUMNS, MARK_COLUMNS = 240, 100

HEIGHT = 520


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalePoint:
    """The first step at a loss scale, or a step that overflowed at it."""

    step: int
    """Training step, from 1."""
    epoch: float
    """The same moment in epochs, from 0, which makes trials of different batch sizes comparable."""
    scale: float
    count: int = 1
    """Number of overflows that it stands for, if they are too dense to be shown one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The loss scale of one trial."""

    trial: TrialRecord
    points: tuple[ScalePoint, ...]
    """Every change, and the end of every epoch."""
    overflows: tuple[ScalePoint, ...]
    """Every skipped step, with the scale that was too high."""


def trace_scale(trial: TrialRecord) -> Trajectory:
    """Return the loss scale of a trial over its steps; without points if it had none, or if none was recorded."""
    points: list[ScalePoint] = []
    overflows: list[ScalePoint] = []
    last_epoch, last_steps = 0, 0
    for report in trial.epochs:
        steps = max(1, report.steps - last_steps)
        length = (report.epoch - last_epoch) / steps

        def at(step: int, scale: float, first: int = last_epoch, before: int = last_steps, per: float = length) -> Any:
            return ScalePoint(step=step, epoch=first + (step - 1 - before) * per, scale=scale)

        changes = list(zip(report.loss_scale_steps, report.loss_scale_values, strict=False))
        if changes and report.loss_scale is not None:
            changes.append((report.steps + 1, report.loss_scale))  # in force after the epoch's last step
        for step, scale in changes:
            before = points[-1].scale if points else scale
            if scale < before:
                overflows.append(at(step - 1, before))
            if not points or scale != before or step > report.steps:
                points.append(at(step, scale))
        last_epoch, last_steps = report.epoch, report.steps
    return Trajectory(trial=trial, points=tuple(points), overflows=tuple(overflows))


def trace_scales(run: Run) -> list[Trajectory]:
    """Return the loss scales of all trials that recorded one."""
    return [trajectory for trajectory in map(trace_scale, run.trials) if trajectory.points]


def count_first_steps(trajectories: Sequence[Trajectory]) -> int:
    """Return how many steps the first panel shows: enough for nine in ten trials to apply one."""
    firsts = sorted(
        trajectory.trial.last.first_applied_step or 0 for trajectory in trajectories if trajectory.trial.last
    )
    late = firsts[min(len(firsts) - 1, math.ceil(0.9 * len(firsts)))] if firsts else 0
    return min(max(FEWEST_FIRST_STEPS, math.ceil(1.3 * late / 10) * 10), MOST_FIRST_STEPS)


# ---- draw ----


def draw_scales(run: Run, trajectories: Sequence[Trajectory]) -> tuple[go.Figure, go.Figure]:
    """Draw the first steps by step, and whole trials by epoch, on the same axis of powers of two."""
    values = [point.scale for trajectory in trajectories for point in trajectory.points]
    axis = power_axis("loss scale", values, raise_to_power)
    steps = count_first_steps(trajectories)
    epochs = max(trajectory.points[-1].epoch for trajectory in trajectories)
    first = _draw_panel(run, [_cut(trajectory, steps) for trajectory in trajectories], axis, by_step=True)
    first.update_xaxes(range=[0, steps + 1], title_text="training step")
    first.update_layout(title_text=f"First {steps} steps")
    whole = _draw_panel(run, [_thin(trajectory, epochs) for trajectory in trajectories], axis, by_step=False)
    whole.update_xaxes(range=[-0.01 * epochs, 1.01 * epochs], title_text="epoch", dtick=count_step(math.ceil(epochs)))
    whole.update_layout(title_text="Whole trials")
    return first, whole


def _draw_panel(run: Run, trajectories: Sequence[Trajectory], axis: Axis, *, by_step: bool) -> go.Figure:
    # The winner is drawn last, on top of all others; completed trials are above the rest.
    order = {status: place for place, status in enumerate((TrialStatus.STOPPED, *TrialStatus, TrialStatus.COMPLETED))}
    drawn = sorted(trajectories, key=lambda of: (run.is_winner(of.trial), order[of.trial.status]))
    lines = [_draw_line(trajectory, axis, run.is_winner(trajectory.trial), by_step=by_step) for trajectory in drawn]
    marks = [
        _draw_overflows(trajectory, axis, run.is_winner(trajectory.trial), by_step=by_step)
        for trajectory in drawn
        if trajectory.overflows
    ]
    return build_figure(
        [*lines, *marks], height=HEIGHT, x={"title": {"text": ""}}, y=axis.as_plotly(), showlegend=False
    )


def _draw_line(trajectory: Trajectory, axis: Axis, is_winner: bool, *, by_step: bool) -> go.Scatter:
    points = trajectory.points
    return go.Scatter(
        x=_places(points, by_step=by_step),
        y=axis.place_all(point.scale for point in points),
        mode="lines",
        line={"shape": "hv", **style_line(trajectory.trial, is_winner=is_winner)},
        opacity=1.0 if is_winner else 0.6,
        customdata=[[point.step, _describe_scale(point.scale)] for point in points],
        meta=[describe_trial(trajectory.trial), trajectory.trial.trial_id],
        hovertemplate="%{meta[0]}<br>from step %{customdata[0]}: %{customdata[1]}<extra></extra>",
        legendgroup=str(trajectory.trial.status),
    )


def _draw_overflows(trajectory: Trajectory, axis: Axis, is_winner: bool, *, by_step: bool) -> go.Scatter:
    points = trajectory.overflows
    return go.Scatter(
        x=_places(points, by_step=by_step),
        y=axis.place_all(point.scale for point in points),
        mode="markers",
        marker={
            "symbol": "x-thin",
            "size": 6,
            "line": {
                "width": 1.5 if is_winner else 1.0,
                "color": colour_of("ink" if is_winner else trajectory.trial.status),
            },
        },
        opacity=1.0 if is_winner else 0.8,
        customdata=[[point.step, _describe_scale(point.scale), _describe_count(point)] for point in points],
        meta=[describe_trial(trajectory.trial), trajectory.trial.trial_id, "overflow"],
        hovertemplate="%{meta[0]}<br>step %{customdata[0]} skipped at %{customdata[1]}%{customdata[2]}<extra></extra>",
        legendgroup=str(trajectory.trial.status),
    )


def _places(points: Iterable[ScalePoint], *, by_step: bool) -> list[float]:
    return [point.step if by_step else round(point.epoch, 5) for point in points]


def _describe_scale(scale: float) -> str:
    """Return ``2^16``; for a scale between powers of two, the value and its exponent."""
    text = format_scale(scale)
    return text if text.startswith("2^") or scale <= 0 else f"{text} (2^{math.log2(scale):.1f})"


def _describe_count(point: ScalePoint) -> str:
    return "" if point.count == 1 else f", and {point.count - 1} more until the next mark"


# ---- fewer points ----


def _cut(trajectory: Trajectory, steps: int) -> Trajectory:
    """Return its first ``steps``, with the scale in force at their end."""
    points = [point for point in trajectory.points if point.step <= steps]
    if points and points[-1].step < min(steps, trajectory.points[-1].step):
        end = min(steps + 1, trajectory.points[-1].step)
        points.append(dataclasses.replace(points[-1], step=end))
    overflows = tuple(point for point in trajectory.overflows if point.step <= steps)
    return dataclasses.replace(trajectory, points=tuple(points), overflows=overflows)


def _thin(trajectory: Trajectory, width: float) -> Trajectory:
    """Keep at most four points (first, extremes, last) and one mark in a column of a figure ``width`` epochs wide."""
    return dataclasses.replace(
        trajectory,
        points=tuple(
            point for column in _split(trajectory.points, width / COLUMNS) for point in _keep_extremes(column)
        ),
        overflows=tuple(
            dataclasses.replace(column[0], count=len(column))
            for column in _split(trajectory.overflows, width / MARK_COLUMNS)
        ),
    )


def _split(points: Iterable[ScalePoint], width: float) -> Iterator[list[ScalePoint]]:
    for _, column in itertools.groupby(points, key=lambda point: math.floor(point.epoch / width)):
        yield list(column)


def _keep_extremes(column: Sequence[ScalePoint]) -> list[ScalePoint]:
    kept = (column[0], min(column, key=_scale_of), max(column, key=_scale_of), column[-1])
    return sorted({point.step: point for point in kept}.values(), key=lambda point: point.step)


def _scale_of(point: ScalePoint) -> float:
    return point.scale
