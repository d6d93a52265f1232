"""A report's figures of the searched parameters: their importance, each alone, and all together."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.report.axes import Axis, setting_axis
from tune_amp.report.figures import build_objective_axis, draw_ring, draw_trials
from tune_amp.report.run import Run, find_value
from tune_amp.report.style import build_figure, colour_of, describe_trial, format_status, list_statuses, style_line
from tune_amp.results.importance import ImportanceResult
from tune_amp.results.records import TrialRecord
from tune_amp.space.parameter import Parameter
from tune_amp.trial.config import TrialStatus

ROW_HEIGHT = 92


def draw_importance(result: ImportanceResult) -> go.Figure:
    """Draw a bar for each parameter, with a mark for the importance that permuted values reach."""
    rows = list(reversed(result.rows))  # plotly draws from the bottom up
    names = [row.parameter for row in rows]
    bars = go.Bar(
        x=[row.importance for row in rows],
        y=names,
        orientation="h",
        marker={
            "color": [colour_of("completed" if row.told_from_noise else "stopped") for row in rows],
            "opacity": [1.0 if row.told_from_noise else 0.55 for row in rows],
        },
        width=0.5,
        customdata=[[row.p_value, f"{'' if row.told_from_noise else 'in'}distinguishable from noise"] for row in rows],
        hovertemplate="%{y}: importance %{x:.2f}, p %{customdata[0]:.3f}<br>%{customdata[1]}<extra></extra>",
        showlegend=False,
    )
    marker = {"symbol": "line-ns", "size": 26, "line": {"width": 3, "color": colour_of("ink")}}
    noise = go.Scatter(
        x=[row.null_95 for row in rows],
        y=names,
        mode="markers",
        marker=marker,
        name="what 5% of permutations reach",
        hovertemplate="%{y}: 95% of permutations stay below %{x:.2f}<extra></extra>",
    )
    x = {"title": {"text": "importance, of 1 in all"}, "rangemode": "tozero"}
    return build_figure([bars, noise], height=120 + 46 * len(rows), x=x, y={"type": "category", "showgrid": False})


def draw_slices(run: Run) -> dict[str, go.Figure]:
    """Draw, for each searched parameter, the first objective of every trial against it."""
    y = build_objective_axis(run, run.objective)
    return {parameter.name: _draw_slice(run, parameter, y) for parameter in run.parameters}


def _draw_slice(run: Run, parameter: Parameter, y: Axis) -> go.Figure:
    settings = {trial.trial_id: run.find_setting(parameter, trial.config) for trial in run.trials}
    x = setting_axis(parameter, settings.values())
    traces = []
    for status in list_statuses(run.trials):
        group = [trial for trial in run.trials if trial.status is status and settings[trial.trial_id] is not None]
        xs = x.place_all(settings[trial.trial_id] for trial in group)
        traces.append(draw_trials(run, group, xs, y, name=format_status(status)))
    if run.winner and run.winner.trial.last:  # the default configuration was not a trial
        trial = run.winner.trial
        place = x.place(run.find_setting(parameter, trial.config))
        traces.append(draw_ring([place], [y.place(find_value(trial, run.objective))], "rank 1"))
    return build_figure(traces, height=300, x=x.as_plotly(), y=y.as_plotly(title={"text": ""}), showlegend=False)


# ---- parallel coordinates ----


def draw_parallel(run: Run) -> go.Figure:
    """Draw each trial as a line through its settings, one a row, to its objective in the last row.

    Rows replace plotly's own upright axes: they are readable on a narrow screen, show choices and settings that some
    trials lack, and need no WebGL.
    """
    axes = {
        parameter.name: setting_axis(parameter, [run.find_setting(parameter, trial.config) for trial in run.trials])
        for parameter in run.parameters
    }
    outcome = build_objective_axis(run, run.objective)
    rows = [*axes.values(), outcome]
    drawn = sorted(
        (trial for trial in run.trials if find_value(trial, run.objective) is not None),
        key=lambda trial: (run.is_winner(trial), trial.status is TrialStatus.COMPLETED),
    )
    lines = [_draw_path(run, trial, axes, outcome) for trial in drawn]
    hidden = {"visible": False, "fixedrange": True}
    return build_figure(
        lines,
        height=80 + ROW_HEIGHT * len(rows),
        x={**hidden, "range": [-0.03, 1.03]},
        y={**hidden, "range": [-len(rows) + 0.4, 0.45]},
        showlegend=False,
        shapes=[_draw_row(index) for index in range(len(rows))],
        annotations=[note for index, axis in enumerate(rows) for note in _label_row(index, axis)],
    )


def _draw_path(run: Run, trial: TrialRecord, axes: Mapping[str, Axis], outcome: Axis) -> go.Scatter:
    is_winner = run.is_winner(trial)
    settings = [run.find_setting(parameter, trial.config) for parameter in run.parameters]
    places = [axis.share(value) for axis, value in zip(axes.values(), settings, strict=True)]
    value = find_value(trial, run.objective)
    assert value is not None
    shown = [f"{axis.title} {axis.show(value)}" for axis, value in zip(axes.values(), settings, strict=True) if value]
    return go.Scatter(
        x=[*places, outcome.share(value)],
        y=[-float(index) for index in range(len(places) + 1)],
        mode="lines",
        line=style_line(trial, is_winner=is_winner),
        connectgaps=True,
        opacity=1.0 if is_winner else 0.5,
        text=["<br>".join([*shown, f"{outcome.title} {outcome.show(value)}"])] * (len(places) + 1),
        meta=[describe_trial(trial), trial.trial_id],
        hovertemplate="%{meta[0]}<br>%{text}<extra></extra>",
        legendgroup=str(trial.status),
    )


def _draw_row(index: int) -> dict[str, Any]:
    line = {"color": colour_of("muted"), "width": 1}
    return {"type": "line", "x0": 0, "x1": 1, "y0": -index, "y1": -index, "line": line, "layer": "below"}


def _label_row(index: int, axis: Axis) -> Sequence[dict[str, Any]]:
    shared = {"showarrow": False, "yref": "y", "xref": "x", "bgcolor": colour_of("surface"), "borderpad": 1}
    span = axis.high - axis.low
    ticks = [
        {
            **shared,
            "x": (position - axis.low) / span,
            "y": -index,
            "text": text,
            "yshift": -12,
            "font": {"size": 11, "color": colour_of("muted")},
        }
        for position, text in axis.ticks
    ]
    title = {**shared, "x": 0, "xanchor": "left", "y": -index, "yshift": 14, "text": f"<b>{axis.title}</b>"}
    return [*ticks, title]
