"""A report's sections of trials: a heading, a sentence or two, a figure, and how to read it."""

import types
from collections.abc import Mapping, Sequence

from tune_amp.report.axes import format_value, objective_title
from tune_amp.report.figures import (
    build_curve_axis,
    build_objective_axis,
    draw_curves,
    draw_epochs,
    draw_history,
    draw_pareto,
)
from tune_amp.report.page import Figure, LineKey, Section, Table
from tune_amp.report.run import MISSING, Run, find_value, list_metrics
from tune_amp.report.scales import Trajectory, draw_scales, trace_scales
from tune_amp.report.style import count_of, format_status, list_statuses
from tune_amp.report.summary import format_seconds
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import EpochMetrics, TrialStatus
from tune_amp.trial.objectives import metric_of

_ENDS: Mapping[TrialStatus, str] = types.MappingProxyType(
    {
        TrialStatus.COMPLETED: "that completed",
        TrialStatus.STOPPED: "that were stopped",
        TrialStatus.DIVERGED: "that diverged",
        TrialStatus.OUT_OF_MEMORY: "that ran out of memory",
        TrialStatus.FAILED: "that failed",
        TrialStatus.INTERRUPTED: "that were interrupted",
    }
)


# ---- shared ----


def describe_trouble(trouble: str) -> str:
    """Return why a file is not used, in words that follow its name."""
    return trouble if trouble == MISSING else f"cannot be read ({trouble})"


def build_key(run: Run, trials: Sequence[TrialRecord], *, marks: str | None = None) -> LineKey:
    """Return the key of a figure in which each of ``trials`` is a line."""
    groups = [(str(status), format_status(status)) for status in list_statuses(trials)]
    return LineKey(groups, winner=any(map(run.is_winner, trials)), marks=marks)


def format_epochs(trial: TrialRecord) -> str:
    """Return epochs trained of the most allowed, such as ``2/8``."""
    return f"{trial.last.epoch if trial.last else 0}/{trial.config.max_epochs}"


# ---- the trials ----


def build_history(run: Run) -> Section:
    """Build the section on the search's history, trial by trial."""
    if not run.trials:
        return Section(["No trial was started."])
    caption = (
        "Every mark is a trial at its last epoch: symbol and colour say how it ended, the line is the best value so "
        "far. Trials that ended early are shown with the value that they had. "
        + build_objective_axis(run, run.objective).note
    )
    name = metric_of(run.objective)
    label = f"{name} of {count_of(len(run.trials), 'trial')} in the order of their start"
    figures = []
    for other in run.provenance.objectives[1:]:
        text = (
            f"{name} against {metric_of(other)}. The ringed trials are the Pareto set: no other trial is at least as "
            "good in all objectives and better in one."
        )
        if any(find_value(trial, other) is not None for trial in run.trials):
            figures.append(Figure(text, {f"pareto-{other}": (text, draw_pareto(run, other))}))
    figures.append(Figure(caption, {"history-plot": (label, draw_history(run))}))
    return Section(figures=figures, tables=[_list_trials(run)])


def _list_trials(run: Run) -> Table:
    metrics = list_metrics(run)
    columns = ["trial", "status", "epochs", *map(objective_title, metrics), "skipped steps", "training"]
    rows = [
        [trial.trial_name, format_status(trial.status), format_epochs(trial), *_format_last(trial.last, metrics)]
        for trial in run.trials
    ]
    if any(trial.error for trial in run.trials):
        columns.append("error")
        rows = [[*row, trial.error or ""] for row, trial in zip(rows, run.trials, strict=True)]
    return Table(columns, rows, long="error", summary=f"{count_of(len(rows), 'trial')} as a table")


def _format_last(last: EpochMetrics | None, metrics: Sequence[str]) -> list[str]:
    """Return metrics, skipped steps and time as cells of a table."""
    if last is None:
        return [""] * (len(metrics) + 2)
    values = [format_value(metric, last.find_value(metric)) for metric in metrics]
    return [*values, f"{last.skipped_steps:,} of {last.steps:,}", f"{last.train_seconds:.3g} s"]


def build_epochs(run: Run) -> Section:
    """Build the section on how many trials reached which epoch."""
    if not any(trial.last for trial in run.trials):
        return Section(["No trial came to the end of an epoch."])
    silent = sum(trial.last is None for trial in run.trials)
    caption = (
        "A bar for every epoch, as high as the number of trials that trained it. The faint part went on; the others "
        f"ended there: at the end of their budget (completed), {_explain_stops(run)}"
        + (f" {silent} ended before the first report and are in no bar." if silent else "")
    )
    return Section([describe_savings(run)], [Figure(caption, {"epochs-plot": (caption, draw_epochs(run))})])


def _explain_stops(run: Run) -> str:
    scheduler = run.provenance.scheduler
    if scheduler == "none":
        return "or for another reason."
    how = "for doing worse than the median of the others" if scheduler == "median" else "at one of its rungs"
    return (
        f"stopped by the scheduler {how}, or for another reason. Whether a stopped trial would have won, a search "
        "cannot know."
    )


def describe_savings(run: Run) -> str:
    """Return the epochs spent and saved, and what saved them."""
    spent = sum(trial.last.epoch for trial in run.trials if trial.last)
    full = sum(trial.config.max_epochs for trial in run.trials)
    trained = f"{count_of(len(run.trials), 'trial')} trained {count_of(spent, 'epoch')}"
    text = f"{trained} of the {full:,} that all would have taken at full budget"
    if spent == full:
        return f"{text}: none ended early."
    saved = {status: _count_saved(run, status) for status in TrialStatus}
    parts = [f"{count_of(epochs, 'epoch')} of trials {_ENDS[status]}" for status, epochs in saved.items() if epochs]
    text = f"{text}, {1 - spent / full:.0%} less. Not trained: {', '.join(parts)}."
    seconds = sum(_estimate_rest(trial) for trial in run.trials if trial.status is TrialStatus.STOPPED)
    if not seconds:
        return text
    return f"{text} At their own pace, stopped trials would have taken {format_seconds(seconds)} more of slot time."


def _count_saved(run: Run, status: TrialStatus) -> int:
    of_status = [trial for trial in run.trials if trial.status is status]
    return sum(trial.config.max_epochs - (trial.last.epoch if trial.last else 0) for trial in of_status)


def _estimate_rest(trial: TrialRecord) -> float:
    """Return the seconds that the rest of a trial would have taken at its own pace."""
    last = trial.last
    if last is None:
        return 0.0
    return (last.train_seconds + last.val_seconds) / max(1, last.epoch) * (trial.config.max_epochs - last.epoch)


def build_scales(run: Run) -> Section:
    """Build the section on the loss scale of every trial."""
    trajectories = trace_scales(run)
    if not trajectories:
        return Section([_explain_no_scale(run)])
    overflows = sum(len(trajectory.overflows) for trajectory in trajectories)
    first, whole = draw_scales(run, trajectories)
    plots = {
        "scales-first": ("loss scale of every trial in its first training steps, with overflows marked", first),
        "scales-whole": ("loss scale of every trial by epoch, with overflows marked", whole),
    }
    trials = [trajectory.trial for trajectory in trajectories]
    key = build_key(run, trials, marks="overflow: step skipped" if overflows else None)
    return Section(
        [_describe_overflows(trajectories, overflows)], [Figure(_ABOUT_SCALES, plots, layout="panels", key=key)]
    )


_ABOUT_SCALES = (
    "Each line is the loss scale of one trial, on an axis of powers of two. A cross is an overflow: that training "
    "step was skipped, and the scale, which was too high, came down. After growth_interval steps without one it is "
    "raised. The first panel shows the first steps one by one; the second whole trials, in epochs, so that all batch "
    "sizes have the same width. Stairs of crosses are training time lost. A saw-tooth is a scale that grows into its "
    "ceiling again and again. A level line never overflowed: its scale is well placed, or so low that gradients "
    "vanish. Hover over a line to follow it; the boxes hide groups. Where crosses would cover each other, one stands "
    "for several."
)


def _describe_overflows(trajectories: Sequence[Trajectory], overflows: int) -> str:
    steps = sum(trajectory.trial.last.steps for trajectory in trajectories if trajectory.trial.last)
    trials = f"{count_of(len(trajectories), 'trial')} trained in fp16 with loss scaling"
    share = f"{overflows / max(1, steps):.1%}"
    return f"{trials}: {overflows:,} of {steps:,} training steps overflowed and were skipped ({share})."


def _explain_no_scale(run: Run) -> str:
    if all(trial.config.precision != "fp16" for trial in run.trials):
        return "No trial trained in fp16: only fp16 needs loss scaling, so there is no loss scale to show."
    trouble = run.troubles.get(run.folder.epochs)
    if trouble:
        return f"The loss scales stand in epochs.parquet, which {describe_trouble(trouble)}."
    return "No trial in fp16 came to the end of an epoch, so that no loss scale is known."


def build_curves(run: Run) -> Section:
    """Build the section on validation by epoch."""
    axis = build_curve_axis(run)
    if axis is None:
        return Section(["No trial was validated."])
    trouble = run.troubles.get(run.folder.epochs)
    notes = [f"Only last epochs are shown: epochs.parquet {describe_trouble(trouble)}."] if trouble else []
    caption = (
        f"Each line is the {axis.title} of a trial after every epoch; the thick one is rank 1. Where a line ends, so "
        f"did its trial. {axis.note}"
    )
    key = build_key(run, [trial for trial in run.trials if trial.epochs])
    return Section(
        notes,
        [Figure(caption, {"curves-plot": ("validation by epoch of every trial", draw_curves(run, axis))}, key=key)],
    )
