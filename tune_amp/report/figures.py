"""A report's figures of all trials: history, settings, epochs, validation curves, fresh seeds, and slot time.

plotly draws them directly: the plots of ``optuna.visualization`` show neither how a trial ended nor after how many
epochs.
"""

import collections
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.report.axes import (
    Axis,
    count_ticks,
    format_value,
    linear_axis,
    objective_axis,
    objective_title,
    setting_axis,
)
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
from tune_amp.results.importance import ImportanceResult
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
    axis = build_objective_axis(run, run.objective)
    numbers = {trial.trial_id: number for number, trial in enumerate(run.trials, start=1)}
    traces = [_draw_best_so_far(run, axis, numbers), *_draw_trials(run, numbers, axis, run.ranked[:1], "rank 1")]
    size = {"height": HEIGHT, "showlegend": True}  # plotly.js leaves out the legend of a single trace
    x = {"title": "trial, in order of start", **count_ticks(len(run.trials))}
    missing = [trial for trial in run.trials if find_value(trial, run.objective) is None]
    if not missing:
        return build_figure(traces, **size, xaxis=x, yaxis=axis.as_plotly())
    points = [(numbers[trial.trial_id], "no value", _describe_point(run, trial, ())) for trial in missing]
    statuses = [trial.status for trial in missing]
    marker = _style_marks([SYMBOLS[status] for status in statuses], [*map(colour_of, statuses)])
    traces.append(_draw_points(points, marker=marker, yaxis="y2", showlegend=False))
    y = axis.as_plotly(domain=[0.14, 1], visible=len(missing) < len(run.trials))
    row = {"domain": [0, 0.1], "type": "category"}
    return build_figure(traces, **size, xaxis={**x, "anchor": "y2"}, yaxis=y, yaxis2=row)


def draw_pareto(run: Run, other: str) -> go.Figure:
    """Draw the first objective against another one, with the Pareto set ringed."""
    y, x = build_objective_axis(run, run.objective), build_objective_axis(run, other)
    xs = _place_trials(x, {trial.trial_id: find_value(trial, other) for trial in run.trials})
    traces = _draw_trials(run, xs, y, run.ranked, "Pareto set", other)
    return build_figure(traces, height=HEIGHT, xaxis=x.as_plotly(), yaxis=y.as_plotly())


def draw_slices(run: Run) -> dict[str, go.Figure]:
    """Draw, for each searched parameter, the first objective of every trial against it."""
    y = build_objective_axis(run, run.objective)
    figures = {}
    for parameter in run.parameters:
        settings = {trial.trial_id: run.find_setting(parameter, trial.config) for trial in run.trials}
        x = setting_axis(parameter, settings.values())
        traces = _draw_trials(run, _place_trials(x, settings), y, run.ranked[:1], "rank 1")
        axes = {"xaxis": x.as_plotly(), "yaxis": y.as_plotly(title="")}
        figures[parameter.name] = build_figure(traces, height=300, showlegend=False, **axes)
    return figures


def build_objective_axis(run: Run, objective: str) -> Axis:
    """Return the axis of an objective, for the last values of all trials."""
    values = [find_value(trial, objective) for trial in run.trials]
    return objective_axis(objective, values, run.provenance.validation_images)


def _place_trials(axis: Axis, values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(values, axis.place_all(values.values()), strict=True))


def _draw_trials(
    run: Run, xs: Mapping[str, Any], axis: Axis, ringed: Sequence[BestRow], ring: str, *others: str
) -> Iterator[go.Scatter]:
    """Draw trials as points, their first objective against ``xs``, and a ring around some.

    Args:
        run: the run.
        xs: trial id -> position; None for a trial that is not drawn.
        axis: the axis of the first objective.
        ringed: rows with a ring; one that is no trial of the search has none.
        ring: name of the ring.
        others: objectives that the hover text says in addition.
    """
    ys = _place_trials(axis, {trial.trial_id: find_value(trial, run.objective) for trial in run.trials})
    for status in list_statuses(run.trials):
        group = [trial for trial in run.trials if trial.status is status and xs[trial.trial_id] is not None]
        points = [(xs[trial.trial_id], ys[trial.trial_id], _describe_point(run, trial, others)) for trial in group]
        yield _draw_points(points, marker=_style_marks(SYMBOLS[status], colour_of(status)), name=format_status(status))
    ids = [row.trial.trial_id for row in ringed if row.trial.trial_id in xs]
    marker = {"symbol": "circle-open", "size": 17, "color": colour_of("ink"), "line": {"width": 2}}
    if ids:
        points = [(xs[trial_id], ys[trial_id], "") for trial_id in ids]
        yield _draw_points(points, marker=marker, name=ring, hoverinfo="skip", hovertemplate=None)


def _style_marks(symbol: Any, colour: Any) -> dict[str, Any]:
    return {"symbol": symbol, "color": colour, "size": 9, "opacity": 0.85}


def _describe_point(run: Run, trial: TrialRecord, others: Iterable[str]) -> str:
    values = {name: format_value(name, find_value(trial, name)) or "none" for name in (run.objective, *others)}
    return "<br>".join([describe_trial(trial), *(f"{objective_title(name)} {text}" for name, text in values.items())])


def _draw_points(points: Iterable[tuple[Any, Any, str]], **style: Any) -> go.Scatter:
    """Draw points, each a position on both axes and a hover text."""
    xs, ys, texts = [*zip(*points, strict=True)] or ((), (), ())
    return go.Scatter(x=xs, y=ys, text=texts, **{"mode": "markers", "hovertemplate": "%{text}<extra></extra>", **style})


def _draw_best_so_far(run: Run, axis: Axis, numbers: Mapping[str, int]) -> go.Scatter:
    ranked = list_rankable(run)
    best: Callable[[float, float], float] = max if is_maximized(run.objective) else min
    found = [value for trial in ranked if (value := find_value(trial, run.objective)) is not None]
    values = [*itertools.accumulate(found, best)]
    xs = [float(numbers[trial.trial_id]) for trial in ranked]
    if values:  # extended to the last trial
        values.append(values[-1])
        xs.append(len(run.trials) + 0.5)
    line = {"shape": "hv", "color": colour_of("muted"), "width": 1.5}
    return go.Scatter(x=xs, y=axis.place_all(values), mode="lines", line=line, name="best so far", hoverinfo="skip")


def draw_importance(result: ImportanceResult) -> go.Figure:
    """Draw a bar for each parameter, with a mark for the importance that permuted values reach."""
    names = [row.parameter for row in result.rows]
    clear = [row.told_from_noise for row in result.rows]
    bars = go.Bar(
        x=[row.importance for row in result.rows],
        y=names,
        orientation="h",
        marker={
            "color": [colour_of("completed" if one else "stopped") for one in clear],
            "opacity": [1.0 if one else 0.55 for one in clear],
        },
        width=0.5,
        customdata=[[row.p_value, "" if row.told_from_noise else "in"] for row in result.rows],
        hovertemplate="%{y}: importance %{x:.2f}, p %{customdata[0]:.3f}<br>%{customdata[1]}distinguishable from noise"
        "<extra></extra>",
        showlegend=False,
    )
    noise = go.Scatter(
        x=[row.null_95 for row in result.rows],
        y=names,
        mode="markers",
        marker={"symbol": "line-ns", "size": 26, "line": {"width": 3, "color": colour_of("ink")}},
        name="what 5% of permutations reach",
        hovertemplate="%{y}: 95% of permutations stay below %{x:.2f}<extra></extra>",
    )
    y = {"type": "category", "showgrid": False, "autorange": "reversed"}
    height = 120 + 46 * len(names)
    return build_figure([bars, noise], height=height, xaxis={"title": "importance, of 1 in all"}, yaxis=y)


# ---- epochs ----


def draw_epochs(run: Run) -> go.Figure:
    """Draw how many trials reached each epoch, and how those that ended there ended."""
    last = [trial.last.epoch for trial in run.trials if trial.last]
    most = max(1, *last)
    each = -(-most // MOST_BARS)  # epochs of a bar, labelled by the last of them
    epochs = range(each, most + each, each)
    counts = {}
    for status in list_statuses([trial for trial in run.trials if trial.last]):
        own = [trial.last.epoch for trial in run.trials if trial.last and trial.status is status]
        ended = collections.Counter(-(-epoch // each) * each for epoch in own)
        counts[f"{format_status(status)} here"] = colour_of(status), [ended[number] for number in epochs]
    counts["continued"] = colour_of("pale"), [sum(epoch > number for epoch in last) for number in epochs]
    bars = [
        go.Bar(
            x=[*epochs],
            y=heights,
            name=name,
            marker={"color": colour},
            hovertemplate=f"epoch %{{x}}: %{{y}} {name}<extra></extra>",
        )
        for name, (colour, heights) in counts.items()
    ]
    axes = {
        "xaxis": {"title": "epoch", **count_ticks(epochs[-1])},
        "yaxis": {"title": "trials", **count_ticks(len(last))},
    }
    return build_figure(bars, height=320, barmode="stack", bargap=0.25, **axes)


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
    x = {"title": "epoch", **count_ticks(max(trial.epochs[-1].epoch for trial in drawn))}
    traces = [_draw_curve(trial, run.objective, axis, run.is_winner(trial)) for trial in drawn]
    return build_figure(traces, height=HEIGHT, xaxis=x, yaxis=axis.as_plotly(), showlegend=False)


def _draw_curve(trial: TrialRecord, objective: str, axis: Axis, is_winner: bool) -> go.Scatter:
    values = [report.find_value(objective) for report in trial.epochs]
    return go.Scatter(
        x=[report.epoch for report in trial.epochs],
        y=axis.place_all(values),
        mode="lines+markers",
        line=style_line(trial, is_winner=is_winner),
        marker={"symbol": SYMBOLS[trial.status], "size": 7 if is_winner else 5},
        opacity=1.0 if is_winner else 0.6,
        customdata=[format_value(objective, value) or "no value" for value in values],
        meta=[describe_trial(trial), trial.trial_id],
        hovertemplate="%{meta[0]}<br>epoch %{x}: " + axis.title + " %{customdata}<extra></extra>",
        legendgroup=str(trial.status),
    )


# ---- fresh seeds, slot time ----


def draw_confirmed(run: Run) -> go.Figure:
    """Draw mean and interval of every confirmed configuration, its single runs, and the search's own value."""
    rows = [row for row in run.rows if row.confirmation]
    metrics, axis = list_pair(run), linear_axis(run.objective)
    styles = ((0.14, "completed"), (-0.14, "stopped"))[-len(metrics) :]
    traces = []
    for metric, (offset, colour) in zip(metrics, styles, strict=True):
        traces += [_draw_means(run, rows, metric, offset, colour), _draw_runs(run, rows, metric, offset, colour)]
    searched = [
        (axis.place(value), -place - 0.14, f"{axis.title} in the search: {format_value(run.objective, value)}")
        for place, row in enumerate(rows)
        if (value := find_value(row.trial, run.objective)) is not None
    ]
    marker = {"symbol": "diamond-open", "size": 11, "color": colour_of("diverged"), "line": {"width": 2}}
    traces.append(_draw_points(searched, name="in the search", marker=marker))
    x = axis.as_plotly(title=" and ".join(map(objective_title, metrics)), tickangle=0)
    ticks = {"tickvals": [-place for place in range(len(rows))], "ticktext": [row.name for row in rows]}
    y = {**ticks, "showgrid": False, "range": [-len(rows) + 0.4, 0.6]}
    return build_figure(traces, height=140 + 78 * len(rows), xaxis=x, yaxis=y)


def _draw_means(run: Run, rows: Sequence[BestRow], metric: str, offset: float, colour: str) -> go.Scatter:
    title = objective_title(metric)
    intervals = [find_interval(run, row, metric) for row in rows]
    drawn = [(place, interval) for place, interval in enumerate(intervals) if interval]
    points = [
        (interval[0], offset - place, f"{rows[place].name}<br>{title} {format_interval(metric, interval)}")
        for place, interval in drawn
    ]
    ends = {
        "symmetric": False,
        "array": [high - mean for _, (mean, _, high) in drawn],
        "arrayminus": [mean - low for _, (mean, low, _) in drawn],
        "color": colour_of(colour),
        "thickness": 2.5,
        "width": 6,
    }
    marker = {"size": 10, "color": colour_of(colour)}
    name = f"{title}: mean, 95% interval"
    return _draw_points(points, name=name, marker=marker, error_x=ends, showlegend=bool(points))


def _draw_runs(run: Run, rows: Sequence[BestRow], metric: str, offset: float, colour: str) -> go.Scatter:
    points = [
        (value, 1.9 * offset - place, f"{row.name}, seed {one.seed}: {format_value(metric, value)}")
        for place, row in enumerate(rows)
        for one in run.confirmed
        if one.trial_id == row.trial.trial_id and is_finite(value := one.find_value(metric))
    ]
    marker = {"symbol": "circle-open", "size": 6, "color": colour_of(colour), "opacity": 0.9}
    return _draw_points(points, name="each seed", marker=marker, showlegend=offset < 0 and bool(points))


def format_interval(metric: str, interval: tuple[float, float, float]) -> str:
    """Return mean and interval, such as ``97.80% [97.61%, 98.02%]``."""
    mean, low, high = (format_value(metric, value) for value in interval)
    return f"{mean} [{low}, {high}]"


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
    x = {"range": [0, 1.3 * most], "ticksuffix": "%", "title": "share of the slot time"}
    y = {"type": "category", "autorange": "reversed", "showgrid": False}
    return build_figure([bars], height=90 + 34 * len(shares), xaxis=x, yaxis=y)
