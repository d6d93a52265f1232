"""The result of a search, as the search itself and ``tune-amp show`` print it: the same lines from the same code.

Imports neither torch nor Ray, so that a run is shown at once, on any machine with pyarrow and Optuna.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tune_amp.cli.console import say
from tune_amp.monitor.tables import describe_confirmed, render_confirmed, render_ranking
from tune_amp.monitor.terminal import describe_counts, render_importance
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.gain import without_seed
from tune_amp.results.importance import ImportanceResult, describe_importance, load_importance, measure_importance
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import choose_best, describe_ties, list_obstacles
from tune_amp.results.records import (
    BestRow,
    SlotTime,
    TrialRecord,
    load_best_rows,
    load_confirmed,
    load_epochs,
    load_trials_file,
)
from tune_amp.results.run_folder import RunFolder
from tune_amp.results.utilisation import describe_utilisation
from tune_amp.search.options import DEFAULT_RESULTS_DIR, name_run
from tune_amp.space.space import parse_space
from tune_amp.trial.text import count_of, printable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The result of a search, as it is printed."""

    folder: Path
    """The run folder."""
    trials: Sequence[TrialRecord]
    """All trials, in order of submission."""
    ranked: Sequence[TrialRecord]
    """The best trials by the search's own numbers; empty if no trial produced a result."""
    best: Sequence[BestRow]
    """Rows of ``best.parquet``; empty if there is none."""
    confirmed_runs: Sequence[ConfirmedRun] = ()
    """Runs of the best configurations on fresh seeds."""
    provenance: Provenance
    importance: ImportanceResult
    slot_time: SlotTime | None
    """None if the search was killed, or is still running."""
    interrupted: bool = False
    """Whether a signal ended the search. Its files do not distinguish this from an exhausted time budget."""
    is_out_of_time: bool = False
    """Whether the time budget ended the search before its trials did; False if no longer known."""
    wrap_up_seconds: float | None = None
    """Seconds from the last trial's end until files and importance were written; None if no longer known."""
    confirm_seconds: float | None = None
    """Seconds spent on fresh seeds; None if there were none, or if no longer known."""
    is_ranking_wanted: bool = False
    """Whether the search's own ranking is shown even if fresh seeds give a better one."""

    @property
    def is_confirmed(self) -> bool:
        """Whether the best were trained again on fresh seeds."""
        return any(row.confirmation is not None for row in self.best)


def load_summary(folder: Path, top_k: int | None = None) -> RunSummary:
    """Return the result of a run from its files. Some are missing if the run was killed.

    The ``top_k`` best are ranked: by default as many as the search ranked, or 3 if it was killed.

    Raises:
        InputError: ``trials.parquet`` or ``epochs.parquet`` is missing, or any file is damaged or of another version.
    """
    run = RunFolder(folder)
    ended = load_trials_file(folder)
    trials, about = load_epochs(folder, ended.trials), ended.provenance
    best = load_best_rows(folder) if run.best.exists() else []
    if run.importance.exists():
        importance = load_importance(folder)
    else:  # mostly yields why the search wrote none
        space = parse_space(about.space_source, about.space_text)
        sizes = {"train_images": about.train_images, "seed": about.seed}
        importance = measure_importance(space, trials, about.objectives[0], **sizes)
    return RunSummary(
        folder=folder,
        trials=trials,
        ranked=choose_best(trials, about.objectives, top_k or sum(not row.is_default for row in best) or 3),
        best=best,
        confirmed_runs=load_confirmed(folder) if run.confirm.exists() else (),
        provenance=about,
        importance=importance,
        slot_time=ended.slot_time,
        is_ranking_wanted=top_k is not None,
    )


def print_summary(console: Console, summary: RunSummary, reuse: str, errors: Console) -> None:
    """Print counts, ranking with ties or confirmation, importance, slot time, files and the command for reuse.

    The reasons for having no result are printed to ``errors``.
    """
    run = RunFolder(summary.folder)
    console.print(describe_counts(summary.trials))
    if summary.interrupted or summary.is_out_of_time:
        console.print(_describe_early_end(summary), soft_wrap=True)
    if not summary.ranked:
        say(console, *_describe_slot_time(summary))
        if not summary.trials:
            errors.print("[bold red]no trial has begun[/]")
            return
        errors.print("[bold red]no trial produced a result[/]:")
        for line in list_obstacles(summary.trials):  # the commonest reasons first
            say(errors, f"  {line}")
        errors.print(printable(f"every trial is in {run.trials}"), markup=False, soft_wrap=True)
        return
    console.print()
    if summary.is_ranking_wanted or not summary.is_confirmed or len(summary.provenance.objectives) > 1:
        console.print(render_ranking(summary.ranked, summary.provenance))
        ties = describe_ties(summary.ranked, summary.provenance)
        if ties:
            say(console, ties)
        console.print()
    if summary.is_confirmed:
        print_confirmed(console, summary.best, summary.provenance)
        console.print()
    elif summary.confirmed_runs or summary.confirm_seconds is not None:
        kept = f"{len(summary.confirmed_runs)} runs are kept; the ranking is the search's own"
        console.print(f"[magenta]confirmation interrupted[/]: {kept}", soft_wrap=True)
        console.print()
    say(console, describe_importance(summary.importance))
    if any(row.told_from_noise for row in summary.importance.rows):
        console.print(render_importance(summary.importance))
    console.print()
    say(console, *_describe_slot_time(summary))
    if summary.is_confirmed:
        seeds = sorted({run.seed for run in summary.confirmed_runs})
        count = len({without_seed(row.trial.config) for row in summary.best if row.confirmation is not None})
        took = "" if summary.confirm_seconds is None else f" in {summary.confirm_seconds:.0f} s"
        say(console, f"confirmed{took}: {count_of(count, 'configuration')} on seeds {', '.join(map(str, seeds))}")
    files = [path.name for path in run.files if path.exists() and path != run.report]
    say(console, f"files    {summary.folder}: {', '.join(files)}")
    if run.report.exists():
        console.print(printable(f"report   {run.report}"), markup=False, soft_wrap=True)
    if run.best.exists():
        console.print(printable(f"reuse    {reuse}"), markup=False, soft_wrap=True)


def print_confirmed(console: Console, rows: Sequence[BestRow], provenance: Provenance) -> None:
    """Print the table of the confirmed configurations and the sentences below it, the verdict last."""
    console.print(render_confirmed(rows, provenance))
    for sentence in describe_confirmed(rows, provenance):
        say(console, sentence)


def _describe_early_end(summary: RunSummary) -> str:
    """Return, as markup, why the search ended before its trials did."""
    if summary.interrupted:
        return "[magenta]interrupted[/]: everything that was reported is kept"
    resume = escape(_name_resume(summary.folder))
    return f"[magenta]the time budget is used up[/]: {resume} with a larger --time-budget resumes the search"


def _name_resume(folder: Path) -> str:
    return f"--resume {shlex.quote(name_run(folder, DEFAULT_RESULTS_DIR))}"


def _describe_slot_time(summary: RunSummary) -> tuple[str, str | None]:
    """Return the use of the slots in a sentence, with its style."""
    if summary.slot_time is None:
        text = "unfinished: the search was cut off, or is still running; the line that it printed, or else"
        return f"{text} {_name_resume(summary.folder)}, resumes it", "yellow"
    wrap_up = "" if summary.wrap_up_seconds is None else f"; then {summary.wrap_up_seconds:.1f} s to wrap up"
    return f"slot time  {describe_utilisation(summary.trials, summary.slot_time)}{wrap_up}", None
