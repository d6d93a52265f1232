"""The sections of a report below its first screen: a heading, a sentence or two, figures, and how to read them."""

import shlex
from collections.abc import Iterator, Sequence

from tune_amp.config import EpochMetrics, TrialStatus
from tune_amp.importance import FEWEST_TRIALS, describe_importance
from tune_amp.report_axes import show_percent
from tune_amp.report_figures import (
    KIND_COLOURS,
    draw_confirmed,
    draw_curves,
    draw_epochs,
    draw_history,
    draw_ledger,
    draw_pareto,
    name_row,
)
from tune_amp.report_page import Html, definitions, figure, join, section, table, tag
from tune_amp.report_parameters import draw_importance, draw_parallel, draw_slices
from tune_amp.report_run import MISSING, Run, find_value
from tune_amp.report_scales import draw_scales, trace_scales
from tune_amp.report_style import say_status
from tune_amp.report_summary import say_seconds, say_setting, tell_interval
from tune_amp.results import BestRow, TrialRecord


def _say(text: str) -> Html:
    return tag("p", text)


# ---- the trials ----


def write_history(run: Run) -> Html:
    """How the search went, trial by trial."""
    if not run.trials:
        return section("history", "How the search went", _say("No trial was started."))
    caption = (
        "Every mark is a trial at its last epoch: its symbol and colour say how it ended, and the line is the best value "
        "so far. Trials that ended early are shown with the value that they had. " + _explain_axis(run.objective)
    )
    label = f"{run.objective} of {len(run.trials)} trials in the order of their start"
    parts: list[Html] = []
    for other in run.provenance.objectives[1:]:
        text = f"{run.objective} against {other}. The ringed trials are the Pareto set: none is beaten in both."
        if any(find_value(trial, other) is not None for trial in run.trials):
            parts.append(figure(text, {f"pareto-{other}": (text, draw_pareto(run, other))}))
    parts.append(figure(caption, {"history-plot": (label, draw_history(run))}))
    return section("history", "How the search went", *parts, _list_trials(run))


def _explain_axis(objective: str) -> str:
    if objective == "val_accuracy":
        return (
            "Equal distances on the axis are equal factors of the error rate: 98% and 99% are as far apart as 96% and "
            "98%."
        )
    return "The axis is logarithmic."


def _list_trials(run: Run) -> Html:
    columns = ("trial", "status", "epochs", "val. accuracy", "val. loss", "skipped steps", "training", "error")
    rows = [
        (
            trial.trial_name,
            say_status(trial.status),
            f"{trial.last.epoch if trial.last else 0}/{trial.config.max_epochs}",
            *_tell_last(trial.last),
            trial.error or "",
        )
        for trial in run.trials
    ]
    return tag("details", tag("summary", f"All {len(rows)} trials as a table"), table(columns, rows, long="error"))


def _tell_last(last: EpochMetrics | None) -> tuple[str, str, str, str]:
    if last is None:
        return ("", "", "", "")
    accuracy = "" if last.val_accuracy is None else show_percent(last.val_accuracy)
    loss = "" if last.val_loss is None else f"{last.val_loss:.4g}"
    return (accuracy, loss, f"{last.skipped_steps:,} of {last.steps:,}", f"{last.train_seconds:.3g} s")


def write_epochs(run: Run) -> Html:
    """How many trials got how far."""
    title = "What early stopping saved"
    if not any(trial.last for trial in run.trials):
        return section("epochs", title, _say("No trial came to the end of an epoch."))
    silent = sum(trial.last is None for trial in run.trials)
    caption = (
        "Every bar is an epoch, and as high as the number of trials that trained it. The pale part went on; the others "
        "ended there: at the end of their budget (completed), stopped by the scheduler at one of its rungs, or for "
        "another reason. Whether a stopped trial would have won, a search cannot know."
        + (f" {silent} ended before the first report and are in no bar." if silent else "")
    )
    plot = draw_epochs(run)
    return section("epochs", title, _say(describe_savings(run)), figure(caption, {"epochs-plot": (caption, plot)}))


def describe_savings(run: Run) -> str:
    """Epochs spent and saved, and by what."""
    spent = sum(trial.last.epoch for trial in run.trials if trial.last)
    full = sum(trial.config.max_epochs for trial in run.trials)
    text = f"{len(run.trials)} trials trained {spent:,} epochs of the {full:,} that all would have taken at full budget"
    if spent == full:
        return f"{text}: none ended early."
    saved = {status: _count_saved(run, status) for status in TrialStatus}
    parts = [f"{epochs:,} by trials that were {say_status(status)}" for status, epochs in saved.items() if epochs]
    listed = ", ".join(parts).replace("that were diverged", "that diverged").replace("that were failed", "that failed")
    listed = listed.replace("that were out of memory", "that ran out of memory")
    seconds = sum(_estimate_rest(trial) for trial in run.trials if trial.status is TrialStatus.STOPPED)
    estimate = (
        f" What the stopped ones had left would have taken about {say_seconds(seconds)} of slot time."
        if seconds
        else ""
    )
    return f"{text}, {1 - spent / full:.0%} less: {listed} were not trained.{estimate}"


def _count_saved(run: Run, status: TrialStatus) -> int:
    of_status = [trial for trial in run.trials if trial.status is status]
    return sum(trial.config.max_epochs - (trial.last.epoch if trial.last else 0) for trial in of_status)


def _estimate_rest(trial: TrialRecord) -> float:
    """Seconds that the rest of a trial would have taken at its own pace."""
    last = trial.last
    if last is None:
        return 0.0
    return (last.train_seconds + last.val_seconds) / last.epoch * (trial.config.max_epochs - last.epoch)


def write_scales(run: Run) -> Html:
    """The loss scale of every trial."""
    title = "The loss scale of every trial"
    trajectories = trace_scales(run)
    if not trajectories:
        return section("scales", title, _say(_tell_why_no_scale(run)))
    overflows = sum(len(trajectory.overflows) for trajectory in trajectories)
    steps = sum(trajectory.trial.last.steps for trajectory in trajectories if trajectory.trial.last)
    text = (
        f"{len(trajectories)} trials trained in fp16 with loss scaling: {overflows:,} of their {steps:,} training steps "
        f"overflowed and were skipped ({overflows / max(1, steps):.1%})."
    )
    caption = (
        "Each line is the loss scale of one trial, on an axis of powers of two. A gradient that overflows in fp16 costs "
        "the training step and lowers the scale: that is a cross, at the scale that was too high. After growth_interval "
        "steps without an overflow the scale is raised. Left, the first steps one by one, where a scale that begins too "
        "high comes down; right, whole trials in epochs, so that trials of all batch sizes have the same width. A line "
        "that starts level began at a scale that fits; a saw-tooth is a scale that grows into the ceiling again and "
        "again; a staircase of crosses is training time lost. Hover over a line to follow it; click a name to hide a "
        "group. Where crosses are too dense to be drawn, one stands for several."
    )
    first, whole = draw_scales(run, trajectories)
    plots = {
        "scales-first": ("loss scale of every trial in its first training steps, with overflows marked", first),
        "scales-whole": ("loss scale of every trial by epoch, with overflows marked", whole),
    }
    return section("scales", title, _say(text), figure(caption, plots, layout="panels"))


def _tell_why_no_scale(run: Run) -> str:
    if all(trial.config.precision != "fp16" for trial in run.trials):
        return "No trial trained in fp16: only fp16 needs loss scaling, so there is no loss scale to show."
    trouble = run.troubles.get("epochs.parquet")
    if trouble:
        return f"The loss scales stand in epochs.parquet, which {_tell_trouble(trouble)}."
    return "No trial in fp16 came to the end of an epoch, so that no loss scale is known."


def _tell_trouble(trouble: str) -> str:
    return trouble if trouble == MISSING else f"cannot be read ({trouble})"


def write_curves(run: Run) -> Html:
    """Validation by epoch."""
    title = "Validation by epoch"
    plot = draw_curves(run)
    if plot is None:
        return section("curves", title, _say("No trial was validated."))
    trouble = run.troubles.get("epochs.parquet")
    notes = [_say(f"Only last epochs are shown: epochs.parquet {_tell_trouble(trouble)}.")] if trouble else []
    caption = (
        "Each line is a trial, validated in fp32 after every epoch; the thick one is rank 1. Lines that end early belong "
        "to trials that did. " + _explain_axis("val_loss" if run.objective == "val_loss" else "val_accuracy")
    )
    return section(
        "curves", title, *notes, figure(caption, {"curves-plot": ("validation by epoch of every trial", plot)})
    )


# ---- the parameters ----


def write_importance(run: Run) -> Html:
    """Which parameters mattered."""
    title = "Which settings mattered"
    result = run.importance
    if result is None:
        return section("importance", title, _say(_tell_why_no_importance(run)))
    line = describe_importance(result).removeprefix("importance ")
    text = f"Importance for {result.objective} {line.rstrip(':')}."
    caption = (
        "A bar is the share of a setting in what separates the best third of the trials from all, each setting by itself. "
        "The upright mark is what 5% of random permutations of its values reach: a bar that ends before its mark, or not "
        "clearly beyond it, is noise, and pale. " + result.method[0].upper() + result.method[1:] + "."
    )
    label = "importance of each searched setting beside what permuted values reach"
    return section(
        "importance", title, _say(text), figure(caption, {"importance-plot": (label, draw_importance(result))})
    )


def _tell_why_no_importance(run: Run) -> str:
    trouble = run.troubles.get("importance.parquet", MISSING)
    if trouble != MISSING:
        return f"Not shown: importance.parquet {_tell_trouble(trouble)}."
    if len(run.trials) < FEWEST_TRIALS:
        return f"Not measured: that needs at least {FEWEST_TRIALS} trials with a value at one epoch, and there are {len(run.trials)}."
    return (
        "Not measured: too few trials had a value at one epoch, or most shared the worst value, or the search did not come "
        "to its end."
    )


def write_parameters(run: Run) -> Html:
    """Slices and parallel coordinates."""
    title = "Settings and what they led to"
    if all(find_value(trial, run.objective) is None for trial in run.trials):
        return section("parameters", title, _say("No trial has a value to show against its settings."))
    slices = {
        f"slice-{name}": (f"{run.objective} of every trial against {name}", plot)
        for name, plot in draw_slices(run).items()
    }
    about_slices = (
        f"{run.objective} of every trial against each searched setting, with symbols and colours as above; the ring is "
        "rank 1. A setting that matters shows a slope or a hill; a flat cloud does not. A search looks more often where it "
        "expects good values, so that crowded places say what it believed."
    )
    about_paths = (
        "Each line is a trial: it goes down through its settings to what came out, in the last row. The thick one is rank "
        "1. Lines that run together from one row to the last show which values go with a good result. Hover over a line to "
        "follow it."
    )
    paths = {"parallel-plot": ("every trial as a line through its settings to its result", draw_parallel(run))}
    return section(
        "parameters",
        title,
        figure(about_slices, slices, layout="slices"),
        tag("h3", "All together"),
        figure(about_paths, paths),
    )


# ---- fresh seeds ----


def write_confirmed(run: Run) -> Html:
    """What fresh seeds say of the best."""
    title = "The best, and what fresh seeds say of them"
    if not run.rows:
        return section("best", title, _say("No trial produced a result that could be ranked."))
    if not any(row.confirmation for row in run.rows):
        text = (
            "The best trials were not trained again on fresh seeds. Their order comes from one seed and "
            f"{run.provenance.validation_images:,} validation images, where differences of some tenths of a point are noise."
        )
        return section("best", title, _say(text), _list_ranked(run))
    trouble = run.troubles.get("confirm.parquet")
    notes = [_say(f"Single runs are not shown: confirm.parquet {_tell_trouble(trouble)}.")] if trouble else []
    caption = (
        "Filled dots are means over the fresh seeds with their 95% interval (Student's t): blue on the test set, which was "
        "read once by every run, grey on the validation images. Small circles are the single runs. The diamond is what the "
        "search had said of the same configuration: how far it lies from the grey dot is the search's optimism. Intervals "
        "that overlap do not make a tie; the table says which are tied. The default is the tutorial's configuration."
    )
    label = "accuracy of every confirmed configuration with its 95% interval"
    plot = figure(caption, {"confirmed-plot": (label, draw_confirmed(run))})
    return section("best", title, *notes, plot, _list_confirmed(run), *_list_failures(run))


def _list_settings(run: Run, row: BestRow) -> Iterator[str]:
    for parameter in run.parameters:
        yield say_setting(parameter.name, getattr(row.trial.config, parameter.name))


def _list_ranked(run: Run) -> Html:
    columns = ("", "trial", *(parameter.name for parameter in run.parameters), "epochs", "val. accuracy", "val. loss")
    rows = [
        (
            name_row(row),
            row.trial.trial_name,
            *_list_settings(run, row),
            f"{row.trial.last.epoch if row.trial.last else 0}/{row.trial.config.max_epochs}",
            *_tell_last(row.trial.last)[:2],
        )
        for row in run.ranked
    ]
    return table(columns, rows, winner=0)


def _list_confirmed(run: Run) -> Html:
    names = [parameter.name for parameter in run.parameters]
    columns = (
        "",
        *names,
        "test accuracy",
        "validation accuracy",
        "in the search",
        "optimism",
        "seeds",
        "tied with rank 1",
    )
    rows = [*run.ranked, *([run.default] if run.default else [])]
    return table(columns, [_tell_confirmed(run, row) for row in rows], winner=0)


def _tell_confirmed(run: Run, row: BestRow) -> Sequence[str]:
    found = row.confirmation
    own = find_value(row.trial, "val_accuracy") if row.rank is not None else None
    in_search = "" if own is None else show_percent(own)
    start = (name_row(row), *_list_settings(run, row))
    if found is None:
        return (*start, "", "", in_search, "", "", "")
    return (
        *start,
        _tell_mean(found.test_accuracy_mean, found.test_accuracy_low, found.test_accuracy_high),
        _tell_mean(found.val_accuracy_mean, found.val_accuracy_low, found.val_accuracy_high),
        in_search,
        _tell_optimism(run, found.optimism),
        str(len(found.confirm_seeds)),
        "" if row is run.winner else {None: "not known", True: "tied", False: "told apart"}[found.tied_with_best],
    )


def _tell_mean(mean: float | None, low: float | None, high: float | None) -> str:
    return "not all completed" if mean is None else f"{show_percent(mean)} {tell_interval(low, high)}"


def _tell_optimism(run: Run, optimism: float | None) -> str:
    if optimism is None:
        return ""
    return f"{optimism:+.4f} nats" if run.objective == "val_loss" else f"{100 * optimism:+.2f} points"


def _list_failures(run: Run) -> Iterator[Html]:
    failures = [
        (name_row(row), text) for row in run.rows if row.confirmation for text in row.confirmation.confirm_failures
    ]
    if failures:
        yield tag("h3", "Runs that did not complete")
        yield table(("", "why"), failures, long="why")


# ---- time, origin ----


def write_ledger(run: Run) -> Html:
    """What the slots spent their time on."""
    title = "What the slots' time went into"
    ledger = run.ledger
    if ledger is None or not ledger.shares:
        trouble = run.troubles.get("trials.parquet")
        reason = f"the ledger cannot be read ({trouble})" if trouble else "the search was killed, or still goes on"
        return section("time", title, _say(f"Not known: {reason}."))
    text = (
        f"{ledger.slots} slot{'' if ledger.slots == 1 else 's'} of {say_seconds(ledger.wall_seconds)} each: "
        f"{ledger.useful:.1%} went into training steps of trials that completed, {ledger.efficiency:.1%} into training "
        "steps of any trial."
    )
    caption = (
        "The whole bar is the time of all slots, places in which a trial runs. The table names its parts from the left."
    )
    rows = [
        (join([_swatch(kind), kind]), say_seconds(ledger.seconds[kind]), f"{share:.1%}")
        for kind, share in ledger.shares.items()
    ]
    plot = figure(caption, {"time-plot": (text, draw_ledger(ledger))})
    return section(
        "time", title, _say(text), plot, tag("div", table(("spent on", "time", "share"), rows), class_="narrow")
    )


def _swatch(kind: str) -> Html:
    colour, opacity = next(style for of, style in KIND_COLOURS.items() if of == kind)
    return tag("i", class_="swatch", style=f"background: var(--{colour}); opacity: {opacity}")


def write_origin(run: Run, version: str) -> Html:
    """Where all of this comes from."""
    origin = run.provenance
    pairs = [
        ("run", origin.run),
        ("started", origin.created),
        ("data", f"{origin.dataset}, sha256 {origin.data_hash}"),
        ("seed", str(origin.seed)),
        ("device", origin.device),
        ("versions", ", ".join(f"{name} {number}" for name, number in sorted(origin.versions.items()))),
        ("report", f"made from the Parquet files of {run.folder} by tune_amp {version}"),
    ]
    unused = [f"{name}: {trouble}" for name, trouble in run.troubles.items()]
    if unused:
        pairs.append(("not used", "; ".join(unused)))
    return section(
        "origin",
        "Where this comes from",
        definitions(pairs),
        tag("h3", "Command"),
        tag("pre", shlex.join(origin.command), class_="command", tabindex=0),
        tag("h3", f"Search space: {origin.space_source}"),
        tag("pre", origin.space_text, tabindex=0),
    )
