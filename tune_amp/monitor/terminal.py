"""Shows a search in the terminal: a live table, plain lines if there is no terminal, JSON lines, or nothing."""

import collections
import functools
import importlib
import io
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from tune_amp.cluster.interrupt import forget_closed_terminal
from tune_amp.monitor.tables import (
    WideTable,
    format_clock,
    format_metric,
    format_metrics,
    list_metrics,
    name_metric,
)
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.importance import ImportanceResult
from tune_amp.results.progress import ConfirmProgress, ConfirmResult, Observer, SearchProgress
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import TrialRecord
from tune_amp.trial.config import TrainingState, TrialStatus, list_values
from tune_amp.trial.text import count_of, dump_json, format_scale, printable

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

SHOWN_BEST = 3
"""Trials that the live view names as the best so far."""


class LiveTable(Observer):
    """A table of the running trials that redraws itself.

    Below it are the best so far, the last that ended, counts by status, and above it the time left.

    Use it as a context manager around the search.
    """

    def __init__(self, console: Console) -> None:
        self._draw: Callable[[], RenderableType] = functools.partial(Text, "starting workers ...", style="dim")
        self._last: TrialRecord | None = None
        self._begun: dict[tuple[str, int], float] = {}
        self._first_end: tuple[float, int] | None = None
        # A function, not a table: the clock moves on between reports.
        self._live: Live | NotebookLive
        if console.is_jupyter:
            self._live = NotebookLive(self._render, width=console.width)
        else:
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._live.stop()
        except OSError:  # the terminal is gone without a SIGHUP: a background process receives none
            forget_closed_terminal()

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Show this progress from the next redraw on."""
        self._last = ended or self._last
        now, running = time.monotonic(), [_name_epoch(trial) for trial in progress.running_trials]
        self._begun = {epoch: self._begun.get(epoch, now) for epoch in running}
        self._draw = functools.partial(render_progress, progress, self._last, self._begun)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Show this progress from the next redraw on."""
        if ended is not None and self._first_end is None:
            self._first_end = time.monotonic(), progress.done
        self._draw = functools.partial(render_confirmation, progress, self._first_end)

    def _render(self) -> RenderableType:
        return self._draw()


def _name_epoch(trial: TrialRecord) -> tuple[str, int]:
    return trial.trial_id, trial.last.epoch if trial.last else 0


class NotebookLive:
    """Redraws what a function returns in the output of a notebook's cell; rich's ``Live`` needs ipywidgets for that."""

    def __init__(self, get_renderable: Callable[[], RenderableType], width: int) -> None:
        self._get_renderable = get_renderable
        self._width = width
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True, name="notebook-live")

    def start(self) -> None:
        """Show the first state."""
        self._notebook = importlib.import_module("IPython.display")  # there is one, or nothing would be shown like this
        self._shown = self._notebook.display(self._draw(), display_id=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave nothing of it."""
        self._over.set()
        self._thread.join()
        self._shown.update(self._notebook.HTML(""))

    def _redraw(self) -> None:
        while not self._over.wait(1):
            self._shown.update(self._draw())

    def _draw(self) -> Any:
        page = Console(file=io.StringIO(), record=True, width=self._width, force_jupyter=False)
        page.print(self._get_renderable())
        style = "white-space: pre; line-height: normal; overflow-x: auto"
        code_format = f'<pre style="{style}">{{code}}</pre>'
        return self._notebook.HTML(page.export_html(code_format=code_format, inline_styles=True))


class PlainLines(Observer):
    """Prints a line for every trial that ends, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Print the trial that ended."""
        if ended is not None:
            line = f"[{progress.count_ended()}/{progress.num_samples}] {describe_trial(ended, progress.objectives)}"
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Print the run that ended."""
        if ended is None:
            seeds = ", ".join(map(str, dict.fromkeys(job.config.seed for job in progress.jobs)))
            distinct = {job.trial_ids for job in progress.jobs}
            line = f"confirming {count_of(len(distinct), 'configuration')} on seeds {seeds}: {len(progress.jobs)} runs"
            done = len(progress.jobs) - (progress.total - progress.done)  # before the search was resumed
            line += f", {done} of them already done" if done else ""
        else:
            parts = [progress.names[ended.trial_id], f"seed {ended.seed}", str(ended.status)]
            parts += format_metrics(list_metrics([progress.objective], ["val_accuracy"]), ended.find_value)
            parts += [ended.error] if ended.error else []
            line = f"[confirm {progress.done}/{progress.total}] {'  '.join(parts)}"
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class JsonLines(Observer):
    """Writes a JSON object on a line for every trial that ends, for programs."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """Write the trial that ended."""
        if ended is not None:
            self.write("trial", describe_as_json(ended))

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        """Write the run that ended."""
        if ended is not None:
            self.write("confirmed_run", list_values(ended))

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """Write one event. Numbers that JSON does not support (NaN, infinity) become null."""
        self._stream.write(dump_json({"event": event, **fields}) + "\n")
        self._stream.flush()


def render_progress(
    progress: SearchProgress, last: TrialRecord | None = None, begun: Mapping[tuple[str, int], float] | None = None
) -> RenderableType:
    """Render the live view: a headline, the running trials, the best so far, the last that ended, and the counts.

    ``begun`` has ``time.monotonic()`` of the report (or the start) of each running trial, by its id and epochs.
    """
    headline = Text.assemble(
        (progress.run, "bold"),
        f"  {progress.model} on {progress.dataset}  ",
        (describe_time(progress), "cyan"),
    )
    ended = progress.ended_trials
    best = choose_best(ended, progress.objectives[:1], SHOWN_BEST)
    parts: list[RenderableType] = [headline, _render_running(progress, begun or {})]
    if best:
        parts += [Text(), _render_best(progress, best)]
    if last is not None:
        parts.append(
            Text(printable(f"last ended  {describe_trial(last, progress.objectives)}"), STATUS_STYLES[last.status])
        )
    return Group(*parts, Text(f"{len(ended)} of {progress.num_samples} trials ended") + _list_counts(ended))


def render_confirmation(progress: ConfirmProgress, first_end: tuple[float, int] | None = None) -> RenderableType:
    """Render the live view of a confirmation: a headline, and each configuration with its mean so far.

    ``first_end`` is ``time.monotonic()`` at the end of the first run, and the number of runs done then. The time left
    is estimated from what followed, because the first run had to wait for its worker.
    """
    clock = f"{format_clock(time.monotonic() - progress.started)} spent"
    if first_end is not None and progress.done > first_end[1]:
        pace = (time.monotonic() - first_end[0]) / (progress.done - first_end[1])
        clock += f", about {format_clock(pace * progress.most_left)} left"
    headline = Text.assemble(
        (progress.run, "bold"), f"  {progress.done} of {progress.total} runs on fresh seeds  ", (clock, "cyan")
    )
    metrics = list_metrics([progress.objective], ["val_accuracy"])
    table = WideTable(["confirming", "runs", *map(name_metric, metrics), ""], left=["confirming", ""])
    for trial_id, name in progress.names.items():
        runs = [run for run in progress.runs if run.trial_id == trial_id]
        completed = [run for run in runs if run.status is TrialStatus.COMPLETED]
        failed = Text("" if len(completed) == len(runs) else f"{len(runs) - len(completed)} failed", "red")
        planned = {run.seed for run in runs} | {job.config.seed for job in progress.jobs if trial_id in job.trial_ids}
        means = (format_metric(metric, _mean(run.find_value(metric) for run in completed)) for metric in metrics)
        table.add_row(name, f"{len(runs)}/{len(planned)}", *means, failed)
    return Group(headline, table)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def describe_counts(trials: Sequence[TrialRecord]) -> Text:
    """Return the trials by status: ``16 trials: 5 completed, 10 stopped, 1 diverged``."""
    return Text(count_of(len(trials), "trial")) + _list_counts(trials)


def _list_counts(trials: Sequence[TrialRecord]) -> Text:
    counts = collections.Counter(trial.status for trial in trials)
    text = Text()
    for status in TrialStatus:
        if counts[status]:
            text.append(", " if text else ": ").append(f"{counts[status]} {status}", STATUS_STYLES[status])
    return text


def render_importance(result: ImportanceResult) -> WideTable:
    """Render the importance of each parameter beside the importance that permuted values reach."""
    table = WideTable(["parameter", "importance", "chance level", "p", ""], left=["parameter", ""])
    for row in result.rows:
        finding = Text("" if row.told_from_noise else "not distinguishable from chance", style="dim")
        table.add_row(row.parameter, f"{row.importance:.2f}", f"{row.null_95:.2f}", f"{row.p_value:.3f}", finding)
    return table


def describe_trial(trial: TrialRecord, objectives: Sequence[str] = ()) -> str:
    """Describe a trial in one line: name, status, last metrics, and the error if there is one."""
    parts = [trial.trial_name, str(trial.status)]
    if trial.last is not None:
        parts.append(f"epoch {trial.last.epoch}")
        parts += format_metrics(list_metrics(objectives, ["val_accuracy"]), trial.last.find_value)
        if trial.last.skipped_steps:
            parts.append(f"{trial.last.skipped_steps} of {trial.last.steps} steps skipped")
    if trial.error:
        parts.append(trial.error)
    return "  ".join(parts)


def describe_time(progress: SearchProgress) -> str:
    """Describe the time spent and, once two trials have ended, an estimate of the time left with the confirmation."""
    spent = time.monotonic() - progress.started
    left = estimate_left(progress, spent)
    text = "" if left is None else f", about {format_clock(left)} left"
    return f"{format_clock(spent)} spent{text}{' with confirmation' if text and progress.confirm_runs else ''}"


def estimate_left(progress: SearchProgress, spent: float) -> float | None:
    """Estimate the seconds left from those of the trials that have ended; None before the second has."""
    ended = progress.ended_trials
    if len(ended) < 2:
        return None
    waiting = progress.num_samples - len(progress.trials)
    trials_left = waiting + len(progress.running) / 2  # those running are halfway, on average
    search = trials_left * statistics.fmean(trial.wall_seconds for trial in ended) / progress.slots
    if progress.time_budget is not None:
        search = min(search, max(0.0, progress.time_budget - spent))
    full = [trial.wall_seconds / trial.last.epoch * trial.config.max_epochs for trial in ended if trial.last]
    if not full or not progress.confirm_runs:
        return search
    starting = max(0.0, spent - sum(trial.wall_seconds for trial in ended) / progress.slots)  # workers start again
    return search + starting + statistics.fmean(full) * progress.confirm_runs / progress.slots


def describe_as_json(trial: TrialRecord) -> dict[str, Any]:
    """Return a trial for JSON: identity, settings and last metrics."""
    config = {name: value for name, value in list_values(trial.config).items() if value is not None}
    last = {} if trial.last is None else {k: v for k, v in list_values(trial.last).items() if not isinstance(v, tuple)}
    identity = {"trial_id": trial.trial_id, "trial_name": trial.trial_name, "status": str(trial.status)}
    return {**identity, "error": trial.error, "config": config, "metrics": last}


def describe_confirmation_as_json(result: ConfirmResult) -> dict[str, Any]:
    """Return a confirmation for JSON: its results for each configuration, best first; the first has the verdict."""
    confirmed = [
        {"rank": row.rank, "trial_id": row.trial.trial_id, **list_values(row.confirmation)}
        for row in result.rows
        if row.confirmation is not None
    ]
    verdict = None
    if confirmed:
        names = ("verdict", "verdict_kind", "gain", "gain_low", "gain_high")
        verdict = {"recommended": confirmed[0]["trial_id"], **{name: confirmed[0][name] for name in names}}
    found = {"confirmed": confirmed, "verdict": verdict, "left_out": result.left_out}
    return {**found, "seconds": result.seconds, "interrupted": result.interrupted}


def _render_running(progress: SearchProgress, begun: Mapping[tuple[str, int], float]) -> WideTable:
    metrics = list_metrics(progress.objectives, ["val_accuracy"])
    names = ["running", "epoch", "this epoch", *map(name_metric, metrics), "training loss", "loss scale", "skipped"]
    table = WideTable(names, left=["running", "loss scale"])
    for trial in progress.running_trials:
        last, start = trial.last, begun.get(_name_epoch(trial))
        elapsed = "" if start is None else format_clock(time.monotonic() - start)
        cells: list[str | Text] = [""] * (len(metrics) + 3)
        if last is not None:
            remark = SCALE_REMARKS.get(TrainingState(last.state))
            scale = Text(format_scale(last.loss_scale)) + Text(f" {remark}" if remark else "", "yellow")
            values = [format_metric(name, last.find_value(name)) for name in metrics]
            cells = [*values, format_metric("train_loss", last.train_loss), scale, str(last.skipped_steps)]
        table.add_row(trial.trial_name, f"{last.epoch if last else 0}/{trial.config.max_epochs}", elapsed, *cells)
    return table


def _render_best(progress: SearchProgress, best: Sequence[TrialRecord]) -> WideTable:
    metrics = list_metrics(progress.objectives, ["val_accuracy"])
    table = WideTable(["best so far", "ended", "epoch", *map(name_metric, metrics)], left=["best so far", "ended"])
    for rank, trial in enumerate(best, start=1):
        last = trial.last
        assert last is not None  # a trial is ranked by its last report
        values = (format_metric(name, last.find_value(name)) for name in metrics)
        epoch = f"{last.epoch}/{trial.config.max_epochs}"
        table.add_row(trial.trial_name, str(trial.status), epoch, *values, style="green" if rank == 1 else None)
    return table
