"""Shows a search in the terminal: a live table, plain lines if there is no terminal, JSON lines, or nothing."""

import collections
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune_amp.cluster.interrupt import forget_closed_terminal
from tune_amp.monitor.tables import settings_cells
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.importance import ImportanceResult
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrainingState, TrialStatus, format_scale
from tune_amp.trial.text import printable

if TYPE_CHECKING:  # for annotations only
    from tune_amp.results.progress import ConfirmProgress, ConfirmResult, SearchProgress

STATUS_STYLES = {
    TrialStatus.COMPLETED: "green",
    TrialStatus.STOPPED: "yellow",
    TrialStatus.DIVERGED: "red",
    TrialStatus.OUT_OF_MEMORY: "red",
    TrialStatus.FAILED: "bold red",
    TrialStatus.INTERRUPTED: "magenta",
}


# Remarks beside the loss scale in the live view. A trial in any other state is fine, or has ended.
SCALE_REMARKS = {TrainingState.CALIBRATING: "too high", TrainingState.STARVED: "too low"}


class LiveTable:
    """A table of the running trials that redraws itself, with the best so far, counts by status and the time left.

    Use it as a context manager around the search.
    """

    def __init__(self, console: Console) -> None:
        self._draw: Callable[[], RenderableType] = functools.partial(Text, "starting workers ...", style="dim")
        # A function, not a table: the clock moves on between reports.
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._live.stop()
        except OSError:  # the terminal is gone without a SIGHUP: a background process receives none
            forget_closed_terminal()

    def on_progress(self, progress: "SearchProgress", ended: TrialRecord | None) -> None:
        """Show this progress from the next redraw on."""
        self._draw = functools.partial(render_progress, progress)

    def on_confirmation(self, progress: "ConfirmProgress", ended: ConfirmedRun | None) -> None:
        """Show this progress from the next redraw on."""
        self._draw = functools.partial(render_confirmation, progress)

    def _render(self) -> RenderableType:
        return self._draw()


class PlainLines:
    """Prints a line for every trial that ends, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_progress(self, progress: "SearchProgress", ended: TrialRecord | None) -> None:
        """Print the trial that ended."""
        if ended is not None:
            number = progress.count_ended()
            line = f"[{number}/{progress.num_samples}] {describe_trial(ended)}"
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def on_confirmation(self, progress: "ConfirmProgress", ended: ConfirmedRun | None) -> None:
        """Print the run that ended."""
        line = f"confirming {describe_plan(progress)}"
        if ended is not None:
            line = f"[confirm {progress.done}/{progress.total}] {describe_run(progress, ended)}"
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class JsonLines:
    """Writes a JSON object on a line for every trial that ends, for programs."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def on_progress(self, progress: "SearchProgress", ended: TrialRecord | None) -> None:
        """Write the trial that ended."""
        if ended is not None:
            self.write("trial", describe_as_json(ended))

    def on_confirmation(self, progress: "ConfirmProgress", ended: ConfirmedRun | None) -> None:
        """Write the run that ended."""
        if ended is not None:
            self.write("confirmed_run", vars(ended))

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """Write one event. Numbers that JSON does not support (NaN, infinity) become null."""
        self._stream.write(json.dumps({"event": event, **_finite(fields)}, allow_nan=False) + "\n")
        self._stream.flush()


class Quiet:
    """Shows nothing."""

    def on_progress(self, progress: "SearchProgress", ended: TrialRecord | None) -> None:
        """Stay silent."""

    def on_confirmation(self, progress: "ConfirmProgress", ended: ConfirmedRun | None) -> None:
        """Stay silent."""


def render_progress(progress: "SearchProgress") -> RenderableType:
    """Render the live view: a headline, the running trials, the best so far and the counts."""
    headline = Text.assemble(
        (progress.run, "bold"),
        f"  {progress.model} on {progress.dataset}  ",
        (describe_time(progress), "cyan"),
    )
    ended = [trial for trial in progress.trials if trial.trial_id not in progress.running]
    best = choose_best(ended, progress.objectives[:1], 1)
    best_line = Text("best so far  ") + (Text(describe_trial(best[0]), "green") if best else Text("none yet", "dim"))
    return Group(headline, _render_running(progress), best_line, render_counts(progress))


def render_confirmation(progress: "ConfirmProgress") -> RenderableType:
    """Render the live view of a confirmation: a headline, and each configuration with its mean so far."""
    spent = _clock(time.monotonic() - progress.started)
    headline = Text.assemble(
        (progress.run, "bold"),
        f"  {progress.done} of {progress.total} runs on fresh seeds  ",
        (f"{spent} spent", "cyan"),
    )
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("confirming", "runs", "val acc", ""):
        table.add_column(name, justify="left" if name in ("confirming", "") else "right")
    for trial_id, name in progress.names.items():
        runs = [run for run in progress.runs if run.trial_id == trial_id]
        accuracies = [run.val_accuracy for run in runs if run.val_accuracy is not None]
        mean = _number(statistics.fmean(accuracies), ".2%") if accuracies else ""
        failed = Text("" if len(accuracies) == len(runs) else f"{len(runs) - len(accuracies)} failed", "red")
        planned = {run.seed for run in runs} | {job.config.seed for job in progress.jobs if trial_id in job.trial_ids}
        table.add_row(Text(name), f"{len(runs)}/{len(planned)}", mean, failed)
    return Group(headline, table)


def render_counts(progress: "SearchProgress") -> Text:
    """Render the number of ended trials, of all trials, and their counts by status."""
    ended = [trial for trial in progress.trials if trial.trial_id not in progress.running]
    return Text(f"{len(ended)} of {progress.num_samples} trials ended") + _list_counts(ended)


def describe_counts(trials: Sequence[TrialRecord]) -> Text:
    """Return the trials by status: ``16 trials: 5 completed, 10 stopped, 1 diverged``."""
    return Text(f"{len(trials)} trials") + _list_counts(trials)


def _list_counts(trials: Sequence[TrialRecord]) -> Text:
    counts = collections.Counter(trial.status for trial in trials)
    text = Text()
    for status in TrialStatus:
        if counts[status]:
            text.append(", " if text else ": ").append(f"{counts[status]} {status}", STATUS_STYLES[status])
    return text


def render_ranking(ranked: Sequence[TrialRecord], objectives: Sequence[str] = ()) -> Table:
    """Render the ranked table at the end of a search: settings, then validation metrics. It fits 80 columns.

    Training time and memory have columns if they are objectives.
    """
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    settings = ("#", "lr", "batch", "precision", "scale", "interval")
    extra = [name for name in objectives if name in _COST_COLUMNS]
    for name in (*settings, "epochs", "accuracy", "loss", "skips"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in [_COST_COLUMNS[name] for name in extra] or ["time"]:
        table.add_column(name, justify="right", no_wrap=True)
    for rank, trial in enumerate(ranked, start=1):
        costs = [_cost(trial, name) for name in extra] or [_clock(trial.wall_seconds)]
        style = "green" if rank == 1 and not extra else None  # a Pareto set has no single winner
        table.add_row(str(rank), *settings_cells(trial.config), *_outcome_cells(trial), *costs, style=style)
    return table


def render_importance(result: ImportanceResult) -> Table:
    """Render the importance of each parameter beside the importance that permuted values reach."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("parameter", "importance", "of noise", "p", ""):
        table.add_column(name, justify="left" if name in ("parameter", "") else "right", no_wrap=True)
    for row in result.rows:
        told = Text("" if row.told_from_noise else "cannot be told from noise", style="dim")
        parameter = Text(printable(row.parameter))  # rich would read a str as markup
        table.add_row(parameter, f"{row.importance:.2f}", f"{row.null_95:.2f}", f"{row.p_value:.3f}", told)
    return table


def describe_trial(trial: TrialRecord) -> str:
    """Describe a trial in one line: name, status, last metrics, and the error if there is one."""
    parts = [trial.trial_name, str(trial.status)]
    if trial.last is not None:
        parts.append(f"epoch {trial.last.epoch}")
        parts.append(f"val_accuracy {_number(trial.last.val_accuracy, '.2%')}")
        if trial.last.skipped_steps:
            parts.append(f"{trial.last.skipped_steps} of {trial.last.steps} steps skipped")
    if trial.error:
        parts.append(trial.error)
    return "  ".join(parts)


def describe_plan(progress: "ConfirmProgress") -> str:
    """Describe what is trained next, and on which seeds."""
    seeds = ", ".join(map(str, dict.fromkeys(job.config.seed for job in progress.jobs)))
    distinct = {job.trial_ids for job in progress.jobs}
    return f"{len(distinct)} configurations on seeds {seeds}: {len(progress.jobs)} runs"


def describe_run(progress: "ConfirmProgress", run: ConfirmedRun) -> str:
    """Describe a run in one line: its configuration, its seed, and how it ended."""
    parts = [progress.names[run.trial_id], f"seed {run.seed}", str(run.status)]
    if run.val_accuracy is not None:
        parts.append(f"val_accuracy {run.val_accuracy:.2%}")
    return "  ".join([*parts, *([run.error] if run.error else [])])


def describe_time(progress: "SearchProgress") -> str:
    """Describe the time spent and, once two trials have ended, an estimate of the time left."""
    spent = time.monotonic() - progress.started
    ended = progress.count_ended()
    left = progress.num_samples - ended
    text = f"{_clock(spent)} spent"
    if ended > 1:
        estimate = spent / ended * left
        if progress.time_budget is not None:
            estimate = min(estimate, max(0.0, progress.time_budget - spent))
        text += f", about {_clock(estimate)} left"
    return text


def describe_as_json(trial: TrialRecord) -> dict[str, Any]:
    """Return a trial for JSON: identity, settings and last metrics."""
    config = {name: value for name, value in vars(trial.config).items() if value is not None}
    last = {} if trial.last is None else {k: v for k, v in vars(trial.last).items() if not isinstance(v, tuple)}
    identity = {"trial_id": trial.trial_id, "trial_name": trial.trial_name, "status": str(trial.status)}
    return {**identity, "error": trial.error, "config": config, "metrics": last}


def describe_confirmation_as_json(result: "ConfirmResult") -> dict[str, Any]:
    """Return a confirmation for JSON: its results for each configuration, best first; the first has the verdict."""
    confirmed = [
        {"rank": row.rank, "trial_id": row.trial.trial_id, **vars(row.confirmation)}
        for row in result.rows
        if row.confirmation is not None
    ]
    verdict = None
    if confirmed:
        names = ("verdict", "verdict_kind", "gain", "gain_low", "gain_high")
        verdict = {"recommended": confirmed[0]["trial_id"], **{name: confirmed[0][name] for name in names}}
    found = {"confirmed": confirmed, "verdict": verdict, "left_out": result.left_out}
    return {**found, "seconds": result.seconds, "interrupted": result.interrupted}


def _render_running(progress: "SearchProgress") -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("running", "epoch", "val acc", "loss", "scale", "", "skips"):
        table.add_column(name, justify="left" if name in ("running", "") else "right")
    for trial in progress.trials:
        if trial.trial_id in progress.running:
            table.add_row(Text(trial.trial_name), *_running_cells(trial))
    return table


def _running_cells(trial: TrialRecord) -> tuple[RenderableType, ...]:
    last = trial.last
    if last is None:
        return (f"0/{trial.config.max_epochs}", *[""] * 5)
    return (
        f"{last.epoch}/{trial.config.max_epochs}",
        _number(last.val_accuracy, ".2%"),
        _loss(last.train_loss),
        format_scale(last.loss_scale),
        Text(SCALE_REMARKS.get(TrainingState(last.state), ""), "yellow"),
        str(last.skipped_steps),
    )


def _outcome_cells(trial: TrialRecord) -> tuple[str, ...]:
    last = trial.last
    assert last is not None  # a trial is ranked by its last report
    metrics = (_number(last.val_accuracy, ".2%"), _loss(last.val_loss), str(last.skipped_steps))
    return (f"{last.epoch}/{trial.config.max_epochs}", *metrics)


_COST_COLUMNS = {"train_seconds": "training", "peak_memory_bytes": "memory"}


def _cost(trial: TrialRecord, name: str) -> str:
    value = getattr(trial.last, name)
    return f"{value:.3g}s" if name == "train_seconds" else f"{value / 2**20:.3g}MiB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _loss(loss: float | None) -> str:
    """Format a loss with at most seven characters, so that the tables fit 80 columns."""
    return "" if loss is None else format(loss, ".4f" if loss < 100 else ".4g")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
