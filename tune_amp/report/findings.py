"""A report's sections of results: importance, settings, confirmation on fresh seeds, slot time and origin."""

from collections.abc import Iterator, Sequence

from tune_amp.report.axes import objective_title, show_percent
from tune_amp.report.figures import USE_COLOURS, draw_confirmed, draw_utilisation
from tune_amp.report.page import Figure, Origin, Section, Swatch, Table, quote_words
from tune_amp.report.parameters import draw_importance, draw_parallel, draw_slices
from tune_amp.report.run import MISSING, Run, find_value
from tune_amp.report.sections import build_key, describe_trouble, format_epochs, format_last
from tune_amp.report.summary import format_interval, format_moment, format_setting
from tune_amp.results.gain import format_difference
from tune_amp.results.importance import FEWEST_TRIALS, describe_importance
from tune_amp.results.records import BestRow
from tune_amp.results.utilisation import describe_utilisation, find_shares, utilisation
from tune_amp.trial.config import read_setting

# ---- the parameters ----


def build_importance(run: Run) -> Section:
    """Build the section on which parameters mattered."""
    result = run.importance
    if result is None:
        return Section([_explain_no_importance(run)])
    line = describe_importance(result).removeprefix("importance ")
    text = f"Importance for {result.objective} {line.rstrip(':')}."
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
    """Build the section on the slices and parallel coordinates."""
    if all(find_value(trial, run.objective) is None for trial in run.trials):
        return Section(["No trial has a value to show against its settings."])
    slices = {
        f"slice-{name}": (f"{run.objective} of every trial against {name}", plot)
        for name, plot in draw_slices(run).items()
    }
    about_slices = (
        f"The {objective_title(run.objective)} of every trial against each searched setting, symbols and colours as "
        "above; the ring is rank 1. A setting that matters shows a slope or a hill, one that does not a flat cloud. "
        "Where marks are crowded, the search expected good values. Trials that were stopped had fewer epochs than "
        "those that completed."
    )
    about_paths = (
        "Each line is a trial: it goes down through its settings to what came out, in the last row. The thick one is "
        "rank 1. Hover over a line to follow it; the boxes hide groups. A setting that a trial does not have is "
        "passed by."
    )
    paths = {"parallel-plot": ("every trial as a line through its settings to its result", draw_parallel(run))}
    key = build_key(run, [trial for trial in run.trials if find_value(trial, run.objective) is not None])
    figures = [
        Figure(about_slices, slices, layout="slices"),
        Figure(about_paths, paths, key=key, heading="All together"),
    ]
    return Section(figures=figures)


# ---- fresh seeds ----


def build_confirmed(run: Run) -> Section:
    """Build the section on the confirmation of the best on fresh seeds."""
    if not run.rows:
        return Section(["No trial produced a result that could be ranked."])
    if not any(row.confirmation for row in run.rows):
        text = (
            "The best trials were not trained again on fresh seeds. Their order comes from one seed and "
            f"{run.provenance.validation_images:,} validation images: differences of some tenths of a point are noise."
        )
        return Section([text], tables=[_list_ranked(run)])
    trouble = run.troubles.get(run.folder.confirm)
    notes = [f"Single runs are not shown: confirm.parquet {describe_trouble(trouble)}."] if trouble else []
    caption = (
        "Filled dots are means over the fresh seeds with their 95% interval (Student's t): blue on the test set, "
        "which each run read once, grey on the validation images. Small circles are the single runs. The diamond is "
        f"the accuracy of the same configuration in the search{_explain_diamond(run)}. "
        "Overlapping intervals do not make a tie: all runs share their seeds, and the table says which may be the best "
        "on the validation images. The default is the tutorial's configuration."
    )
    label = "accuracy of every confirmed configuration with its 95% interval"
    plot = Figure(caption, {"confirmed-plot": (label, draw_confirmed(run))})
    return Section(notes, [plot], [_list_confirmed(run), *_list_failures(run)])


def _explain_diamond(run: Run) -> str:
    if run.objective == "val_loss":
        return "; the table has the difference of the objective, the loss"
    return ": its distance from the grey dot is search minus confirmed"


def _describe_early_ends(run: Run) -> str:
    confirmed = [row.trial for row in run.rows if row.confirmation]
    if any(trial.last and trial.last.epoch < trial.config.max_epochs for trial in confirmed):
        return "For trials that ended early, search minus confirmed compares with the epoch that they had reached."
    return ""


def _list_settings(run: Run, row: BestRow) -> Iterator[str]:
    for parameter in run.parameters:
        yield format_setting(parameter.name, read_setting(row.trial.config, parameter.name))


def _list_ranked(run: Run) -> Table:
    columns = ("", "trial", *(parameter.name for parameter in run.parameters), "epochs", "val. accuracy", "val. loss")
    rows = [
        (
            row.name,
            row.trial.trial_name,
            *_list_settings(run, row),
            format_epochs(row.trial),
            *format_last(row.trial.last)[:2],
        )
        for row in run.ranked
    ]
    return Table(columns, rows, winner=0)


def _list_confirmed(run: Run) -> Table:
    names = [parameter.name for parameter in run.parameters]
    found = (
        "test accuracy",
        "validation accuracy",
        "in the search",
        "search minus confirmed",
        "seeds",
        "may be the best",
    )
    columns = ("", *found, *names)
    return Table(columns, [_format_confirmed(run, row) for row in run.listed], winner=0, note=_describe_early_ends(run))


def _format_confirmed(run: Run, row: BestRow) -> Sequence[str]:
    found = row.confirmation
    own = find_value(row.trial, "val_accuracy")
    in_search = "" if own is None else show_percent(own)
    settings = _list_settings(run, row)
    if found is None:
        return (row.name, "", "", in_search, "", "", "", *settings)
    return (
        row.name,
        _format_mean(found.test_accuracy_mean, found.test_accuracy_low, found.test_accuracy_high),
        _format_mean(found.val_accuracy_mean, found.val_accuracy_low, found.val_accuracy_high),
        in_search,
        "" if found.optimism is None else format_difference(found.optimism, run.objective),
        str(len(found.confirm_seeds)),
        {None: "not known", True: "yes", False: "no"}[row.may_be_best],
        *settings,
    )


def _format_mean(mean: float | None, low: float | None, high: float | None) -> str:
    return "not all completed" if mean is None else f"{show_percent(mean)} {format_interval(low, high)}"


def _list_failures(run: Run) -> Iterator[Table]:
    failures = [(row.name, text) for row in run.rows if row.confirmation for text in row.confirmation.confirm_failures]
    if failures:
        yield Table(("", "why"), failures, long="why", heading="Runs that did not complete")


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
        "The whole bar is the time of all slots, places in which a trial runs. Useful is the training of trials that "
        "completed; the rest is start-up, data, checkpoints and waiting."
    )
    shares = find_shares(utilisation(run.trials, run.slot_time))
    plot = Figure(caption, {"time-plot": (text, draw_utilisation(shares))})
    rows = [(Swatch(use, *USE_COLOURS[use]), f"{share:.1%}") for use, share in shares.items()]
    return Section([f"{text}."], [plot], [Table(("used for", "share"), rows, narrow=True)])


def find_origin(run: Run, version: str) -> Origin:
    """Return the origin of the report's data."""
    origin = run.provenance
    pairs = [
        ("run", origin.run),
        ("started", format_moment(origin.created)),
        ("data", f"{origin.dataset}, sha256 {origin.data_hash}"),
        ("seed", str(origin.seed)),
        ("device", origin.device),
        ("versions", ", ".join(f"{name} {number}" for name, number in sorted(origin.versions.items()))),
        ("report", f"made from the Parquet files of {run.folder.path} by tune_amp {version}"),
    ]
    unused = [f"{path.name}: {trouble}" for path, trouble in run.troubles.items() if trouble != MISSING]
    if unused:
        pairs.append(("not used", "; ".join(unused)))
    return Origin(pairs, quote_words(list_words(origin.command)), origin.space_source, origin.space_text)
