"""The loss scale of every trial, step by step, with a mark at every overflow, which is a lost training step.

``epochs.parquet`` holds each change of the scale with the first step at the new scale. ``GradScaler`` lowers the scale
only after a gradient overflowed, and skips that step: a decrease at step n is an overflow in step n - 1.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.report.axes import Axis, count_ticks, power_axis
from tune_amp.report.run import Run
from tune_amp.report.style import build_figure, describe_trial, style_line
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrialStatus
from tune_amp.trial.text import format_scale

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
        length = (report.epoch - last_epoch) / max(1, report.steps - last_steps)
        changes = list(zip(report.loss_scale_steps, report.loss_scale_values, strict=False))
        if changes and report.loss_scale is not None:
            changes.append((report.steps + 1, report.loss_scale))  # in force after the epoch's last step
        for step, scale in changes:
            epoch = last_epoch + (step - 1 - last_steps) * length
            before = points[-1].scale if points else scale
            if scale < before:
                overflows.append(ScalePoint(step=step - 1, epoch=epoch - length, scale=before))
            if not points or scale != before or step > report.steps:
                points.append(ScalePoint(step=step, epoch=epoch, scale=scale))
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
    axis = power_axis("loss scale", [point.scale for trajectory in trajectories for point in trajectory.points])
    steps = count_first_steps(trajectories)
    epochs = max(trajectory.points[-1].epoch for trajectory in trajectories)
    first = _draw_panel(run, [_cut(trajectory, steps) for trajectory in trajectories], axis, lambda point: point.step)
    first.update_xaxes(range=[0, steps + 1], title="training step")
    first.update_layout(title=f"First {steps} steps")
    thinned = [_thin(trajectory, epochs) for trajectory in trajectories]
    whole = _draw_panel(run, thinned, axis, lambda point: round(point.epoch, 5))
    whole.update_xaxes(range=[-0.01 * epochs, 1.01 * epochs], title="epoch", **count_ticks(epochs))
    whole.update_layout(title="Whole trials")
    return first, whole


def _draw_panel(
    run: Run, trajectories: Sequence[Trajectory], axis: Axis, place: Callable[[ScalePoint], float]
) -> go.Figure:
    # The winner is drawn last, on top of all others; completed trials are above the rest.
    order = {status: place for place, status in enumerate((TrialStatus.STOPPED, *TrialStatus, TrialStatus.COMPLETED))}
    drawn = sorted(trajectories, key=lambda of: (run.is_winner(of.trial), order[of.trial.status]))
    lines, marks = [], []
    for trajectory in drawn:
        trial, is_winner = trajectory.trial, run.is_winner(trajectory.trial)
        style = style_line(trial, is_winner=is_winner)
        lines.append(
            go.Scatter(
                x=[place(point) for point in trajectory.points],
                y=axis.place_all(point.scale for point in trajectory.points),
                mode="lines",
                line={"shape": "hv", **style},
                opacity=1.0 if is_winner else 0.6,
                customdata=[[point.step, _describe_scale(point)] for point in trajectory.points],
                meta=[describe_trial(trial), trial.trial_id],
                hovertemplate="%{meta[0]}<br>from step %{customdata[0]}: %{customdata[1]}<extra></extra>",
                legendgroup=str(trial.status),
            )
        )
        line = {"width": 1.5 if is_winner else 1.0, "color": style["color"]}
        marks.append(
            go.Scatter(
                x=[place(point) for point in trajectory.overflows],
                y=axis.place_all(point.scale for point in trajectory.overflows),
                mode="markers",
                marker={"symbol": "x-thin", "size": 6, "line": line},
                opacity=1.0 if is_winner else 0.8,
                customdata=[[point.step, _describe_scale(point)] for point in trajectory.overflows],
                meta=[describe_trial(trial), trial.trial_id, "overflow"],
                hovertemplate="%{meta[0]}<br>step %{customdata[0]} skipped at %{customdata[1]}<extra></extra>",
                legendgroup=str(trial.status),
            )
        )
    return build_figure([*lines, *marks], height=HEIGHT, yaxis=axis.as_plotly(), showlegend=False)


def _describe_scale(point: ScalePoint) -> str:
    """Return ``2^16``; for a scale between powers of two, the value and its exponent; then what the mark stands for."""
    text = format_scale(point.scale)
    if not text.startswith("2^") and point.scale > 0:
        text = f"{text} (2^{math.log2(point.scale):.1f})"
    return text if point.count == 1 else f"{text}, and {point.count - 1} more until the next mark"


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
    scale_of = operator.attrgetter("scale")
    kept = (column[0], min(column, key=scale_of), max(column, key=scale_of), column[-1])
    return sorted({point.step: point for point in kept}.values(), key=lambda point: point.step)
