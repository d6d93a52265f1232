"""A report's figures of all trials: history, epochs, validation curves, confirmation on fresh seeds, and slot time.

plotly draws them directly: the plots of ``optuna.visualization`` show neither how a trial ended nor after how many
epochs.
"""

import collections
import types
from collections.abc import Iterator, Mapping, Sequence

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.report.axes import Axis, count_step, format_value, linear_axis, objective_axis, objective_title
from tune_amp.report.run import Run, find_interval, find_value, list_pair, list_rankable
from tune_amp.report.style import (
    SYMBOLS,
    build_figure,
    colour_of,
    describe_trial,
    format_status,
    list_statuses,
    style_line,
)
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.results.utilisation import SlotUse
from tune_amp.trial.config import TrialStatus, is_finite
from tune_amp.trial.objectives import is_maximized

HEIGHT = 420
MOST_BARS = 200
"""Most bars of the figure of epochs; with more epochs, a bar stands for several."""

USE_COLOURS: Mapping[SlotUse, str] = types.MappingProxyType(
    {
        SlotUse.USEFUL: "completed",
        SlotUse.STOPPED: "stopped",
        SlotUse.LOST: "diverged",
        SlotUse.EVALUATION: "interrupted",
        SlotUse.REST: "pale",
    }
)


# ---- the trials ----


def draw_history(run: Run) -> go.Figure:
    """Draw the objective of every trial in order of start; trials without a value are in a row below."""
    axis = _with_place_for_none(build_objective_axis(run, run.objective), run)
    numbers = {trial.trial_id: number for number, trial in enumerate(run.trials, start=1)}
    traces = [_draw_best_so_far(run, axis, numbers)]
    for status in list_statuses(run.trials):
        group = [trial for trial in run.trials if trial.status is status]
        xs = [float(numbers[trial.trial_id]) for trial in group]
        traces.append(draw_trials(run, group, xs, axis, name=format_status(status)))
    if run.winner and run.winner.trial.trial_id in numbers:
        trial = run.winner.trial
        traces.append(draw_ring([numbers[trial.trial_id]], [axis.place(find_value(trial, run.objective))], "rank 1"))
    count = len(run.trials)
    margin = 0.6 + 0.01 * count
    x = {
        "title": {"text": "trial, in order of start"},
        "range": [1 - margin, count + margin],
        "dtick": count_step(count),
    }
    return build_figure(traces, height=HEIGHT, x=x, y=axis.as_plotly())


def draw_pareto(run: Run, other: str) -> go.Figure:
    """Draw the first objective against another one, with the Pareto set ringed."""
    y, x = build_objective_axis(run, run.objective), build_objective_axis(run, other)
    traces = []
    for status in list_statuses(run.trials):
        group = [trial for trial in run.trials if trial.status is status and find_value(trial, other) is not None]
        xs = x.place_all(find_value(trial, other) for trial in group)
        traces.append(draw_trials(run, group, xs, y, name=format_status(status), also=(other, x)))
    front = [row.trial for row in run.ranked]
    xs = x.place_all(find_value(trial, other) for trial in front)
    traces.append(draw_ring(xs, y.place_all(find_value(trial, run.objective) for trial in front), "Pareto set"))
    return build_figure(traces, height=HEIGHT, x=x.as_plotly(), y=y.as_plotly())


def draw_trials(
    run: Run,
    trials: Sequence[TrialRecord],
    xs: Sequence[float | None],
    axis: Axis,
    *,
    name: str,
    also: tuple[str, Axis] | None = None,
) -> go.Scatter:
    """Draw trials of one status as points: their first objective against ``xs``."""
    status = trials[0].status if trials else TrialStatus.COMPLETED
    axes = [(run.objective, axis)] + ([also] if also else [])
    return go.Scatter(
        x=xs,
        y=axis.place_all(find_value(trial, run.objective) for trial in trials),
        mode="markers",
        marker={"symbol": SYMBOLS[status], "size": 9, "color": colour_of(status), "opacity": 0.85},
        name=name,
        text=["<br>".join([describe_trial(trial), *_describe_values(trial, axes)]) for trial in trials],
        hovertemplate="%{text}<extra></extra>",
    )


def build_objective_axis(run: Run, objective: str) -> Axis:
    """Return the axis of an objective, spanning all trials."""
    values = [find_value(trial, objective) for trial in run.trials]
    return objective_axis(objective, values, run.provenance.validation_images)


def _with_place_for_none(axis: Axis, run: Run) -> Axis:
    """Return ``axis``, extended below by a place for trials without a value if there are any."""
    missing = [find_value(trial, run.objective) is None for trial in run.trials]
    if not any(missing):
        return axis
    below = axis.low - 0.08 * (axis.high - axis.low)
    return axis.replace(
        place=lambda value: below if value is None else axis.place(value),
        ticks=((below, "no value"), *(() if all(missing) else axis.ticks)),
        low=below - 0.06 * (axis.high - axis.low),
    )


def _draw_best_so_far(run: Run, axis: Axis, numbers: Mapping[str, int]) -> go.Scatter:
    best = max if is_maximized(run.objective) else min
    values: list[float] = []
    xs: list[float] = []
    for trial in list_rankable(run):
        value = find_value(trial, run.objective)
        assert value is not None  # otherwise it would not be ranked
        values.append(best(values[-1], value) if values else value)
        xs.append(numbers[trial.trial_id])
    if values:  # extended to the last trial
        values.append(values[-1])
        xs.append(len(run.trials) + 0.5)
    line = {"shape": "hv", "color": colour_of("muted"), "width": 1.5}
    return go.Scatter(x=xs, y=axis.place_all(values), mode="lines", line=line, name="best so far", hoverinfo="skip")


def draw_ring(xs: Sequence[float | None], ys: Sequence[float | None], name: str) -> go.Scatter:
    """Draw a ring around points."""
    marker = {"symbol": "circle-open", "size": 17, "color": colour_of("ink"), "line": {"width": 2}}
    return go.Scatter(x=xs, y=ys, mode="markers", marker=marker, name=name, hoverinfo="skip")


def _describe_values(trial: TrialRecord, axes: Sequence[tuple[str, Axis]]) -> Iterator[str]:
    for name, axis in axes:
        value = find_value(trial, name)
        yield f"{axis.title} {'none' if value is None else axis.show(value)}"


# ---- epochs ----


def draw_epochs(run: Run) -> go.Figure:
    """Draw how many trials reached each epoch, and how those that ended there ended."""
    last = [trial.last.epoch for trial in run.trials if trial.last]
    most = max(1, *last)
    each = -(-most // MOST_BARS)  # epochs of a bar, labelled by the last of them
    epochs = range(each, most + each, each)
    bars = []
    for status in list_statuses([trial for trial in run.trials if trial.last]):
        own = [trial.last.epoch for trial in run.trials if trial.last and trial.status is status]
        ended = collections.Counter(-(-epoch // each) * each for epoch in own)
        name = format_status(status)
        bars.append(_draw_bars(epochs, [ended[number] for number in epochs], f"{name} here", colour_of(status)))
    went_on = [sum(epoch > number for epoch in last) for number in epochs]
    bars.append(_draw_bars(epochs, went_on, "went on", colour_of("pale")))
    x = {"title": {"text": "epoch"}, "dtick": count_step(epochs[-1]), "range": [0.4, epochs[-1] + 0.6 * each]}
    y = {"title": {"text": "trials"}, "rangemode": "tozero", "dtick": count_step(len(last))}
    return build_figure(bars, height=320, x=x, y=y, barmode="stack", bargap=0.25)


def _draw_bars(epochs: Sequence[int], counts: Sequence[int], name: str, colour: str) -> go.Bar:
    return go.Bar(
        x=list(epochs),
        y=counts,
        name=name,
        marker={"color": colour},
        hovertemplate=f"epoch %{{x}}: %{{y}} {name}<extra></extra>",
    )


def build_curve_axis(run: Run) -> Axis | None:
    """Return the axis of the first objective after every epoch; None if no epoch has a value."""
    values = [report.find_value(run.objective) for trial in run.trials for report in trial.epochs]
    if all(value is None for value in values):
        return None
    return objective_axis(run.objective, values, run.provenance.validation_images)


def draw_curves(run: Run, axis: Axis) -> go.Figure:
    """Draw the first objective by epoch on ``axis``, the winner on top."""
    drawn = sorted(
        (trial for trial in run.trials if trial.epochs),
        key=lambda trial: (run.is_winner(trial), trial.status is TrialStatus.COMPLETED),
    )
    traces = [_draw_curve(trial, run.objective, axis, run.is_winner(trial)) for trial in drawn]
    x = {"title": {"text": "epoch"}, "dtick": count_step(max(t.epochs[-1].epoch for t in drawn))}
    return build_figure(traces, height=HEIGHT, x=x, y=axis.as_plotly(), showlegend=False)


def _draw_curve(trial: TrialRecord, objective: str, axis: Axis, is_winner: bool) -> go.Scatter:
    values = [report.find_value(objective) for report in trial.epochs]
    shown = ["no value" if value is None else axis.show(value) for value in values]
    return go.Scatter(
        x=[report.epoch for report in trial.epochs],
        y=axis.place_all(values),
        mode="lines+markers",
        line=style_line(trial, is_winner=is_winner),
        marker={"symbol": SYMBOLS[trial.status], "size": 7 if is_winner else 5},
        opacity=1.0 if is_winner else 0.6,
        customdata=shown,
        meta=[describe_trial(trial), trial.trial_id],
        hovertemplate="%{meta[0]}<br>epoch %{x}: " + axis.title + " %{customdata}<extra></extra>",
        legendgroup=str(trial.status),
    )


# ---- fresh seeds, slot time ----


def draw_confirmed(run: Run) -> go.Figure:
    """Draw mean and interval of every confirmed configuration, its single runs, and the search's own value."""
    rows = [row for row in run.listed if row.confirmation]
    places = {row.name: float(-index) for index, row in enumerate(rows)}
    metrics = list_pair(run)
    styles = ((0.14, "completed"), (-0.14, "stopped"))[-len(metrics) :]
    traces = []
    for metric, (offset, colour) in zip(metrics, styles, strict=True):
        traces.append(_draw_intervals(run, rows, metric, offset, places, colour))
        traces.append(_draw_runs(run, rows, metric, offset, places, colour))
    traces.append(_draw_search_values(run, rows, places))
    intervals = [find_interval(run, row, metric) or () for row in rows for metric in metrics]
    values = [*(value for trace in traces for value in trace.x), *(end for ends in intervals for end in ends)]
    title = " and ".join(map(objective_title, metrics))
    x = linear_axis(title, values, lambda value: format_value(run.objective, value))
    ticks = {"tickmode": "array", "tickvals": [*places.values()], "ticktext": [*places], "showgrid": False}
    y = {**ticks, "range": [-len(rows) + 0.4, 0.6]}
    return build_figure(traces, height=140 + 78 * len(rows), x=x.as_plotly(tickangle=0), y=y)


def _draw_intervals(
    run: Run, rows: Sequence[BestRow], metric: str, offset: float, places: Mapping[str, float], colour: str
) -> go.Scatter:
    drawn = [(row.name, interval) for row in rows if (interval := find_interval(run, row, metric))]
    title = objective_title(metric)
    return go.Scatter(
        x=[mean for _, (mean, _, _) in drawn],
        y=[places[name] + offset for name, _ in drawn],
        mode="markers",
        marker={"size": 10, "color": colour_of(colour)},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - mean for _, (mean, _, high) in drawn],
            "arrayminus": [mean - low for _, (mean, low, _) in drawn],
            "color": colour_of(colour),
            "thickness": 2.5,
            "width": 6,
        },
        name=f"{title}: mean, 95% interval",
        showlegend=bool(drawn),
        text=[format_interval(metric, interval) for _, interval in drawn],
        customdata=[name for name, _ in drawn],
        hovertemplate=f"%{{customdata}}<br>{title} %{{text}}<extra></extra>",
    )


def format_interval(metric: str, interval: tuple[float, float, float]) -> str:
    """Return mean and interval, such as ``97.80% [97.61%, 98.02%]``."""
    mean, low, high = (format_value(metric, value) for value in interval)
    return f"{mean} [{low}, {high}]"


def _draw_runs(
    run: Run, rows: Sequence[BestRow], metric: str, offset: float, places: Mapping[str, float], colour: str
) -> go.Scatter:
    names = {row.trial.trial_id: row.name for row in rows}
    drawn = [
        (names[one.trial_id], one.seed, value)
        for one in run.confirmed
        if one.trial_id in names and is_finite(value := one.find_value(metric))
    ]
    marker = {"symbol": "circle-open", "size": 6, "color": colour_of(colour), "opacity": 0.9}
    return go.Scatter(
        x=[value for _, _, value in drawn],
        y=[places[name] + 1.9 * offset for name, _, _ in drawn],
        mode="markers",
        marker=marker,
        name="each seed",
        showlegend=offset < 0 and bool(drawn),
        customdata=[[name, seed, format_value(metric, value)] for name, seed, value in drawn],
        hovertemplate="%{customdata[0]}, seed %{customdata[1]}: %{customdata[2]}<extra></extra>",
    )


def _draw_search_values(run: Run, rows: Sequence[BestRow], places: Mapping[str, float]) -> go.Scatter:
    found = [(row.name, find_value(row.trial, run.objective)) for row in rows]
    drawn = [(name, value) for name, value in found if value is not None]
    return go.Scatter(
        x=[value for _, value in drawn],
        y=[places[name] - 0.14 for name, _ in drawn],
        mode="markers",
        marker={"symbol": "diamond-open", "size": 11, "color": colour_of("diverged"), "line": {"width": 2}},
        name="in the search",
        text=[format_value(run.objective, value) for _, value in drawn],
        hovertemplate=f"{objective_title(run.objective)} in the search: %{{text}}<extra></extra>",
    )


def draw_utilisation(shares: Mapping[SlotUse, float]) -> go.Figure:
    """Draw the slot time as one bar for each use."""
    bars = go.Bar(
        x=[100 * share for share in shares.values()],
        y=[str(use) for use in shares],
        orientation="h",
        width=0.6,
        marker={"color": [colour_of(USE_COLOURS[use]) for use in shares]},
        text=[f"{share:.1%}" for share in shares.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{text} of the slot time<extra></extra>",
    )
    most = 100 * max(shares.values(), default=0.0)
    x = {"range": [0, 1.3 * most], "ticksuffix": "%", "title": {"text": "share of the slot time"}}
    y = {"type": "category", "autorange": "reversed", "showgrid": False}
    return build_figure([bars], height=90 + 34 * len(shares), x=x, y=y)
