"""A report's figures of the searched parameters: their importance, and each alone."""

import plotly.graph_objects as go  # type: ignore[import-untyped]

from tune_amp.report.axes import Axis, setting_axis
from tune_amp.report.figures import build_objective_axis, draw_ring, draw_trials
from tune_amp.report.run import Run, find_value
from tune_amp.report.style import build_figure, colour_of, format_status, list_statuses
from tune_amp.results.importance import ImportanceResult
from tune_amp.space.parameter import Parameter


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
