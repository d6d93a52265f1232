"""A report's sections of results: importance, settings, confirmation on fresh seeds, slot time and origin."""

from collections.abc import Iterator, Sequence

from tune_amp.report.axes import format_value, objective_title
from tune_amp.report.figures import draw_confirmed, draw_importance, draw_slices, draw_utilisation, format_interval
from tune_amp.report.page import Figure, Origin, Section, Table, quote_words
from tune_amp.report.run import MISSING, Run, find_interval, find_value, list_metrics, list_pair
from tune_amp.report.sections import describe_trouble, format_epochs
from tune_amp.report.summary import format_moment, format_setting
from tune_amp.results.gain import format_difference
from tune_amp.results.importance import FEWEST_TRIALS, describe_importance
from tune_amp.results.records import BestRow
from tune_amp.results.utilisation import describe_utilisation, find_shares, utilisation
from tune_amp.trial.config import read_setting
from tune_amp.trial.objectives import metric_of

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
    """Build the section on the slices and parallel coordinates."""
    if all(find_value(trial, run.objective) is None for trial in run.trials):
        return Section(["No trial has a value to show against its settings."])
    slices = {
        f"slice-{name}": (f"{metric_of(run.objective)} of every trial against {name}", plot)
        for name, plot in draw_slices(run).items()
    }
    about_slices = (
        f"The {objective_title(run.objective)} of every trial against each searched setting, symbols and colours as "
        "above; the ring is rank 1. A setting that matters shows a slope or a hill, one that does not a flat cloud. "
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
    return Section(notes, [plot], [_list_best(run), *_list_failures(run)])


def _explain_best(run: Run) -> str:
    confirmed = [row.trial for row in run.rows if row.confirmation]
    text = "Values on fresh seeds are means with 95% intervals." if confirmed else ""
    if any(trial.last and trial.last.epoch < trial.config.max_epochs for trial in confirmed):
        text += " Of trials that ended early, the value in the search is that of the epoch that they had reached."
    return text


def _list_best(run: Run) -> Table:
    """Return a table with a column for each configuration, so that it fits with any number of settings."""
    found = [_describe_best(run, row) for row in run.listed]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [(name, *cells) for name in names if any(cells := [one.get(name, "") for one in found])]
    return Table(("", *(row.name for row in run.listed)), rows, winner=1, note=_explain_best(run))


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
        "All bars together are the time of all slots, places in which a trial runs. Useful is the training of trials "
        "that completed; the rest is start-up, data, checkpoints and waiting."
    )
    shares = find_shares(utilisation(run.trials, run.slot_time))
    return Section(figures=[Figure(caption, {"time-plot": (text, draw_utilisation(shares))})], texts=[f"{text}."])


def find_origin(run: Run, version: str) -> Origin:
    """Return the origin of the report's data."""
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
    return Origin(pairs, quote_words(list_words(origin.command)), origin.space_source, origin.space_text)
