"""A report's sections: a heading, a sentence or two, a figure, and how to read it; at last, the origin of the data."""

import collections
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tune_amp.report.axes import format_value, objective_title
from tune_amp.report.figures import (
    build_curve_axis,
    build_objective_axis,
    draw_confirmed,
    draw_curves,
    draw_epochs,
    draw_history,
    draw_importance,
    draw_pareto,
    draw_slices,
    draw_utilisation,
    format_interval,
)
from tune_amp.report.page import Figure, LineKey, Section, Table, quote_words
from tune_amp.report.run import MISSING, Run, find_interval, find_value, list_metrics, list_pair
from tune_amp.report.scales import draw_scales, trace_scales
from tune_amp.report.style import format_status, list_statuses
from tune_amp.report.summary import format_moment, format_seconds
from tune_amp.results.gain import format_difference
from tune_amp.results.importance import FEWEST_TRIALS, describe_importance
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.results.utilisation import describe_utilisation, find_shares, utilisation
from tune_amp.trial.config import TrialStatus, read_setting
from tune_amp.trial.objectives import metric_of
from tune_amp.trial.text import count_of, format_number, format_setting

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
    has_errors = any(trial.error for trial in run.trials)
    rows = []
    for trial in run.trials:
        row = [trial.trial_name, format_status(trial.status), format_epochs(trial)]
        if last := trial.last:
            row += [format_value(metric, last.find_value(metric)) for metric in metrics]
            row += [f"{last.skipped_steps:,} of {last.steps:,}", f"{format_number(last.train_seconds, 3)} s"]
        row += [""] * (len(columns) - len(row))
        rows.append([*row, trial.error or ""] if has_errors else row)
    columns += ["error"] if has_errors else []
    return Table(columns, rows, long="error", summary=f"{count_of(len(rows), 'trial')} as a table")


def build_epochs(run: Run) -> Section:
    """Build the section on how many trials reached which epoch."""
    if not any(trial.last for trial in run.trials):
        return Section(["No trial completed an epoch."])
    silent = sum(trial.last is None for trial in run.trials)
    caption = (
        "Each bar is an epoch, as high as the number of trials that trained it. The faint part continued; the others "
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
    saved: collections.Counter[TrialStatus] = collections.Counter()
    seconds = 0.0  # that the rest of the stopped trials would have taken
    for trial in run.trials:
        last = trial.last
        saved[trial.status] += trial.config.max_epochs - (last.epoch if last else 0)
        if last and trial.status is TrialStatus.STOPPED:
            rest = (trial.config.max_epochs - last.epoch) / max(1, last.epoch)
            seconds += (last.train_seconds + last.val_seconds) * rest
    full = sum(trial.config.max_epochs for trial in run.trials)
    spent = full - saved.total()
    trained = f"{count_of(len(run.trials), 'trial')} trained {count_of(spent, 'epoch')}"
    text = f"{trained} of the {full:,} that all would have taken at full budget"
    if spent == full:
        return f"{text}: none ended early."
    parts = [f"{count_of(saved[status], 'epoch')} ({format_status(status)})" for status in TrialStatus if saved[status]]
    text = f"{text}, {1 - spent / full:.0%} less. Not trained: {', '.join(parts)}."
    if not seconds:
        return text
    return f"{text} At their own pace, stopped trials would have taken {format_seconds(seconds)} more of slot time."


def build_scales(run: Run) -> Section:
    """Build the section on the loss scale of every trial."""
    trajectories = trace_scales(run)
    if not trajectories:
        return Section([_explain_no_scale(run)])
    trials = [trajectory.trial for trajectory in trajectories]
    overflows = sum(len(trajectory.overflows) for trajectory in trajectories)
    steps = sum(trial.last.steps for trial in trials if trial.last)
    text = (
        f"{count_of(len(trials), 'trial')} trained in fp16 with loss scaling: {overflows:,} of {steps:,} training "
        f"steps overflowed and were skipped ({overflows / max(1, steps):.1%})."
    )
    first, whole = draw_scales(run, trajectories)
    plots = {
        "scales-first": ("loss scale of every trial in its first training steps, with overflows marked", first),
        "scales-whole": ("loss scale of every trial by epoch, with overflows marked", whole),
    }
    key = build_key(run, trials, marks="overflow: step skipped" if overflows else None)
    return Section([text], [Figure(_ABOUT_SCALES, plots, layout="panels", key=key)])


_ABOUT_SCALES = (
    "Each line is the loss scale of one trial, on an axis of powers of two. A cross is an overflow: that training "
    "step was skipped, and the scale, which was too high, came down. After growth_interval steps without one it is "
    "raised. The first panel shows the first steps one by one; the second whole trials, in epochs, so that all batch "
    "sizes have the same width. Stairs of crosses are training time lost. A saw-tooth is a scale that grows into its "
    "ceiling again and again. A level line never overflowed: its scale is well placed, or so low that gradients "
    "vanish. Hover over a line to follow it; the boxes hide groups. Where crosses would cover each other, one stands "
    "for several."
)


def _explain_no_scale(run: Run) -> str:
    if all(trial.config.precision != "fp16" for trial in run.trials):
        return "No trial trained in fp16: only fp16 needs loss scaling, so there is no loss scale to show."
    trouble = run.troubles.get(run.folder.epochs)
    if trouble:
        return f"The loss scales are in epochs.parquet, which {describe_trouble(trouble)}."
    if any(trial.epochs and trial.config.precision == "fp16" for trial in run.trials):
        return "The training loop never called trial.scaler.update(), which records the loss scale."
    return "No fp16 trial completed an epoch, so no loss scale is known."


def build_curves(run: Run) -> Section:
    """Build the section on validation by epoch."""
    axis = build_curve_axis(run)
    if axis is None:
        return Section(["No trial was validated."])
    trouble = run.troubles.get(run.folder.epochs)
    notes = [f"Only last epochs are shown: epochs.parquet {describe_trouble(trouble)}."] if trouble else []
    key = build_key(run, [trial for trial in run.trials if trial.epochs])
    winner = "; the thick one is rank 1" if key.winner else ""  # which the defaults may be, and they are no trial
    caption = (
        f"Each line is the {axis.title} of a trial after every epoch{winner}. Where a line ends, so did its trial. "
        f"{axis.note}"
    )
    return Section(
        notes,
        [Figure(caption, {"curves-plot": ("validation by epoch of every trial", draw_curves(run, axis))}, key=key)],
    )


# ---- the parameters ----


def build_importance(run: Run) -> Section:
    """Build the section on which parameters mattered."""
    result = run.importance
    if result is None:
        return Section([_explain_no_importance(run)])
    line = describe_importance(result).removeprefix("importance ")
    text = f"Importance for {metric_of(result.objective)} {line.rstrip(':')}."
    caption = (
        "A bar is a setting's share in what separates the best third of the trials from all of them, each setting by "
        "itself. The upright mark is what 5% of random permutations of its values reach. A bar that is not clearly "
        f"beyond its mark is indistinguishable from noise, and is pale. {result.method}."
    )
    label = "importance of each searched setting beside what permuted values reach"
    return Section([text], [Figure(caption, {"importance-plot": (label, draw_importance(result))})])


def _explain_no_importance(run: Run) -> str:
    trouble = run.troubles.get(run.folder.importance, MISSING)
    if trouble != MISSING:
        return f"Not shown: importance.parquet {describe_trouble(trouble)}."
    if len(run.trials) < FEWEST_TRIALS:
        return (
            f"Not measured: that needs {FEWEST_TRIALS} trials with a value at one epoch, there are {len(run.trials)}."
        )
    return (
        "Not measured: too few trials had a value at one epoch, or most shared the worst one, or the search was cut "
        "off."
    )


def build_parameters(run: Run) -> Section:
    """Build the section on the slices: a figure for each parameter."""
    if all(find_value(trial, run.objective) is None for trial in run.trials):
        return Section(["No trial has a value to show against its settings."])
    slices = {
        f"slice-{name}": (f"{metric_of(run.objective)} of every trial against {name}", plot)
        for name, plot in draw_slices(run).items()
    }
    ring = "; the ring is rank 1" if any(map(run.is_winner, run.trials)) else ""
    about_slices = (
        f"The {objective_title(run.objective)} of every trial against each searched setting, symbols and colours as "
        f"above{ring}. A setting that matters shows a slope or a hill, one that does not a flat cloud. "
        "Where marks are crowded, the search expected good values. Trials that were stopped had fewer epochs than "
        "those that completed."
    )
    return Section(figures=[Figure(about_slices, slices, layout="slices")])


# ---- fresh seeds ----


def build_confirmed(run: Run) -> Section:
    """Build the section on the confirmation of the best on fresh seeds."""
    if not run.rows:
        return Section(["No trial produced a result that could be ranked."])
    if not any(row.confirmation for row in run.rows):
        text = (
            "The best trials were not trained again on fresh seeds. Their order comes from one seed: small differences "
            "are noise."
        )
        return Section([text], tables=[_list_best(run)])
    trouble = run.troubles.get(run.folder.confirm)
    notes = [f"Single runs are not shown: confirm.parquet {describe_trouble(trouble)}."] if trouble else []
    titles = [objective_title(metric) for metric in list_pair(run)]
    test = f"blue is the {titles[0]}, which each run measured once, " if len(titles) > 1 else ""
    caption = (
        f"Filled dots are means over the fresh seeds with their 95% interval (Student's t): {test}grey is the "
        f"{titles[-1]}. Small circles are the single runs. The diamond is the value of the same configuration in the "
        "search: its distance from the grey dot is search minus confirmed. Overlapping intervals do not make a tie: "
        "all runs share their seeds, and the table says which may be the best by validation. The default is the "
        "tutorial's configuration."
    )
    label = f"{' and '.join(titles)} of every confirmed configuration with 95% intervals"
    plot = Figure(caption, {"confirmed-plot": (label, draw_confirmed(run))})
    failures = [(row.name, text) for row in run.rows if row.confirmation for text in row.confirmation.confirm_failures]
    failed = Table(("", "why"), failures, long="why", heading="Runs that did not complete")
    return Section(notes, [plot], [_list_best(run), *([failed] if failures else [])])


def _list_best(run: Run) -> Table:
    """Return a table with a column for each configuration, so that it fits with any number of settings."""
    found = [_describe_best(run, row) for row in run.rows]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [(name, *cells) for name in names if any(cells := [one.get(name, "") for one in found])]
    confirmed = [row.trial for row in run.rows if row.confirmation]
    note = "Values on fresh seeds are means with 95% intervals." if confirmed else ""
    if any(trial.last and trial.last.epoch < trial.config.max_epochs for trial in confirmed):
        note += " Of trials that ended early, the value in the search is that of the epoch that they had reached."
    return Table(("", *(row.name for row in run.rows)), rows, winner=1, note=note)


def _describe_best(run: Run, row: BestRow) -> dict[str, str]:
    """Return what is known of a configuration: name -> text, empty if there is none."""
    found, last = row.confirmation, row.trial.last
    texts = {}
    if found:
        for metric in dict.fromkeys((*list_pair(run), "test_accuracy", "val_accuracy")):
            interval = find_interval(run, row, metric)
            texts[objective_title(metric)] = format_interval(metric, interval) if interval else ""
        failed, seeds = len(found.confirm_failures), len(found.confirm_seeds)
        texts["fresh seeds"] = f"{failed} of {seeds} did not complete" if failed else str(seeds)
        texts["may be the best"] = {None: "not known", True: "yes", False: "no"}[row.may_be_best]
        optimism = found.optimism
        texts["search minus confirmed"] = "" if optimism is None else format_difference(optimism, run.objective)
    for metric in list_metrics(run):
        value = last.find_value(metric) if last else None
        texts[f"{objective_title(metric)} in the search"] = format_value(metric, value)
    texts["epochs in the search"] = format_epochs(row.trial) if last else ""
    for parameter in run.parameters:
        texts[parameter.name] = format_setting(parameter.name, read_setting(row.trial.config, parameter.name))
    return texts


# ---- time, origin ----


def list_words(given: Sequence[str]) -> list[str]:
    """Return a command as it is typed. ``given`` begins with a script, or with program and command in one word."""
    if not given:
        return []
    first = given[0].split() if given[0].startswith("tune-amp ") else [given[0]]
    return [*(["python"] if first[0].endswith(".py") else []), *first, *given[1:]]


def build_utilisation(run: Run) -> Section:
    """Build the section on the use of the slot time."""
    if run.slot_time is None:
        return Section(["Not known: the search was killed, or is still running."])
    text = describe_utilisation(run.trials, run.slot_time)
    caption = (
        "All bars together are the time of all slots, places in which a trial runs. Useful is the training of trials "
        "that completed; the rest is start-up, data, checkpoints and waiting."
    )
    shares = find_shares(utilisation(run.trials, run.slot_time))
    return Section(figures=[Figure(caption, {"time-plot": (text, draw_utilisation(shares))})], texts=[f"{text}."])


def find_origin(run: Run, version: str) -> dict[str, Any]:
    """Return the origin of the report's data: facts, the words of the search's command, and its space."""
    origin = run.provenance
    pairs = [
        ("run", origin.run),
        ("started", format_moment(origin.created)),
        ("data", f"{origin.dataset}, sha256 {origin.data_hash}" if origin.train_images else origin.dataset),
        ("seed", str(origin.seed)),
        ("device", origin.device),
        ("versions", ", ".join(f"{name} {number}" for name, number in sorted(origin.versions.items()))),
        ("report", f"made from the Parquet files of {run.folder.path} by tune_amp {version}"),
    ]
    unused = [f"{path.name}: {trouble}" for path, trouble in run.troubles.items() if trouble != MISSING]
    if unused:
        pairs.append(("not used", "; ".join(unused)))
    command = quote_words(list_words(origin.command))
    return {"facts": pairs, "command": command, "space_source": origin.space_source, "space_text": origin.space_text}


SECTIONS: Mapping[str, tuple[str, str, Callable[[Run], Section]]] = types.MappingProxyType(
    {
        "history": ("history", "How the search went", build_history),
        "epochs": ("early stopping", "What early stopping saved", build_epochs),
        "scales": ("loss scales", "The loss scale of every trial", build_scales),
        "curves": ("validation", "Validation by epoch", build_curves),
        "importance": ("importance", "Which settings mattered", build_importance),
        "parameters": ("settings", "Settings and what they led to", build_parameters),
        "best": ("fresh seeds", "The best, on fresh seeds", build_confirmed),
        "time": ("slot time", "Use of the slot time", build_utilisation),
    }
)
"""Anchor -> name in the contents, heading, and the function that writes the section."""
