"""The first screen of a report: what was searched, the data, and the result."""

import collections
import datetime
import re
from collections.abc import Iterator

from tune_amp.report.axes import format_value, objective_title
from tune_amp.report.figures import format_interval
from tune_amp.report.page import Finding, Summary, quote_words
from tune_amp.report.run import MISSING, Run, find_interval, find_value, list_pair, list_rankable
from tune_amp.report.style import format_status, list_statuses
from tune_amp.results.gain import format_difference
from tune_amp.results.provenance import list_reuse_words
from tune_amp.results.ranking import describe_ties, list_obstacles
from tune_amp.results.records import BestRow, TrialRecord
from tune_amp.trial.config import DATASETS, list_values
from tune_amp.trial.consent import list_own_code
from tune_amp.trial.objectives import is_maximized, metric_of
from tune_amp.trial.text import count_of, format_setting, join_names


def name_subject(run: Run) -> str:
    """Return ``simple_net on mnist``, or the name of the user's own training."""
    own = next((trial.config.train or trial.config.task for trial in run.trials), None)
    models = sorted({trial.config.model for trial in run.trials})
    return own or f"{' and '.join(models) or 'no trial'} on {run.provenance.dataset}"


def build_summary(run: Run) -> Summary:
    """Build both halves of the first screen."""
    searched = list(_list_searched(run))
    counts = collections.Counter(trial.status for trial in run.trials)
    statuses = [(f"{counts[status]} {format_status(status)}", status) for status in list_statuses(run.trials)]
    if run.winner is None:
        reasons = [Finding(reason, is_warning=True) for reason in list_obstacles(run.trials)]
        return Summary(searched, statuses, "No trial produced a result.", findings=reasons)
    return Summary(
        searched,
        statuses,
        *_describe_verdict(run, run.winner),
        settings={row.name: describe_settings(run, row.trial) for row in (run.winner, run.default) if row},
        findings=list(_list_findings(run, run.winner)),
        reuse=[] if run.folder.best in run.troubles else quote_words(list_reuse(run)),
        unranked=_explain_unranked(run),
    )


# ---- what was searched ----


def _list_searched(run: Run) -> Iterator[tuple[str, str]]:
    origin = run.provenance
    names = ", ".join(parameter.name for parameter in run.parameters)
    yield "space", f"{origin.space_source}: {names}"
    kind = "images" if origin.dataset in DATASETS else "examples"
    sizes = f"{origin.train_images:,} training and {origin.validation_images:,} validation {kind}"
    imbalance = run.trials[0].config.imbalance if run.trials else 1  # the same in all trials of a search
    tail = "" if imbalance == 1 else f", long tail {imbalance:g}:1"
    yield "data", f"{sizes}{tail}" if origin.train_images else "read by the training loop itself"
    directions = {name: "highest" if is_maximized(name) else "lowest" for name in origin.objectives}
    yield "objective", ", ".join(f"{direction} {metric_of(name)}" for name, direction in directions.items())
    yield "algorithms", f"sampler {origin.sampler}, scheduler {origin.scheduler}"
    budgets = sorted({trial.config.max_epochs for trial in run.trials})
    epochs = f" of up to {count_of(budgets[-1], 'epoch')} each" if budgets else ""
    yield "trials", f"{len(run.trials)}{epochs}"
    devices = sorted({(trial.device, trial.num_threads) for trial in run.trials})
    texts = [f"{device}, {count_of(threads, 'CPU thread')} a trial" for device, threads in devices]
    yield "device", "; ".join(texts) or origin.device
    confirmation = run.winner.confirmation if run.winner else None
    confirmed = f"; confirmed on {', '.join(map(str, confirmation.confirm_seeds))}" if confirmation else ""
    yield "seeds", f"{origin.seed} for the sampler and all trials{confirmed}"
    if run.slot_time:
        yield "time", f"{format_seconds(run.slot_time.wall_seconds)} in {count_of(run.slot_time.slots, 'slot')}"


def format_moment(moment: str) -> str:
    """Return ``25 November 2026, 19:06 UTC`` for an ISO 8601 text, or the text itself if it is none."""
    try:
        found = datetime.datetime.fromisoformat(moment).astimezone(datetime.UTC)
    except ValueError:
        return moment
    return f"{found.day} {found:%B %Y, %H:%M} UTC"


def format_seconds(seconds: float) -> str:
    """Return ``42.0 s``, ``3 min 58 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


# ---- what came out ----


def _describe_verdict(run: Run, winner: BestRow) -> tuple[str, str]:
    """Return the verdict in the terminal's words: its headline and the rest of the sentence."""
    verdict = winner.confirmation.verdict if winner.confirmation else None
    if verdict:
        headline, *rest = (f"{part[:1].upper()}{part[1:]}" for part in re.split("[:;] ", verdict, maxsplit=1))
        return headline, "".join(rest)
    value = format_value(run.objective, find_value(winner.trial, run.objective)) or "no value"
    which = ", the best of the Pareto set by it" if len(run.provenance.objectives) > 1 else " of rank 1"
    measured = f"{value} {objective_title(run.objective)}{which}, from the search's one seed"
    return "Not confirmed on fresh seeds", measured


def describe_settings(run: Run, trial: TrialRecord) -> str:
    """Return the searched settings of a trial, and its precision."""
    names = [parameter.name for parameter in run.parameters]
    values = {name: value for name, value in list_values(trial.config).items() if name in (*names, "precision")}
    return ", ".join(f"{name} {text}" for name, value in values.items() if (text := format_setting(name, value)))


def _list_findings(run: Run, winner: BestRow) -> Iterator[Finding]:
    found = winner.confirmation
    if not found:
        texts = [describe_ties([row.trial for row in run.ranked], run.provenance)]
        texts += [_WARNING] if len(list_rankable(run)) > 1 else []  # else nothing was chosen
        if text := " ".join(filter(None, texts)):
            yield Finding(text, is_warning=True)
        return
    for failure in found.confirm_failures:
        yield Finding(f"A run on a fresh seed did not complete: {failure}", is_warning=True)
    for metric in list_pair(run):
        if interval := find_interval(run, winner, metric):
            mean = f"{format_interval(metric, interval)}, mean of {len(found.confirm_seeds)} fresh seeds, 95% interval"
            yield Finding(f"{winner.name.capitalize()}: {objective_title(metric)} {mean}.")
    if found.optimism is not None:
        yield Finding(f"Search minus confirmed: {format_difference(found.optimism, run.objective)}.")
    yield _describe_ties(run)


_WARNING = (
    "Among the best trials of one seed, the order is mostly noise, and the first number is too good: it was chosen for "
    "being the best."
)


def _describe_ties(run: Run) -> Finding:
    confirmed = [row for row in run.rows if row.confirmation]
    judged = [row for row in confirmed if row.may_be_best is not None]
    possible = [row.name for row in judged if row.may_be_best]
    method = "(paired t tests, corrected for their number, 95%)"
    if len(confirmed) == 1:
        return Finding("It was confirmed alone: there is nothing to compare it with.")
    if len(judged) < 2:
        return Finding("Which may be the best is not known: not all runs completed.", is_warning=True)
    if len(possible) == 1:
        which = "" if judged == confirmed else " whose runs all completed"
        return Finding(
            f"{possible[0].capitalize()} is better than every other confirmed configuration{which} {method}."
        )
    text = f"A tie: any of {join_names(possible)} may be the best {method}."
    return Finding(text, is_warning=True)


# ---- reuse ----


def _explain_unranked(run: Run) -> str:
    """Return why there is no command that trains the winner."""
    trouble = run.troubles.get(run.folder.best)
    if not trouble:
        return ""
    reason = "best.parquet is missing (the search was cut off)" if trouble == MISSING else trouble
    return f"Ranked by this report: {reason}, so that no command trains the winner."


def list_reuse(run: Run) -> list[str]:
    """Return the words of the command that trains the winner."""
    assert run.winner is not None
    about, config = run.provenance, run.winner.trial.config
    installed = about.command[:1] != () and about.command[0].startswith("tune-amp")
    train = ("tune-amp", "train") if installed else ("python", "scripts/train.py")
    best = str(run.folder.best)
    return list_reuse_words(train, best, data_dir=about.data_dir, own_code=list_own_code(vars(config)))
