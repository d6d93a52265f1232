"""Records every report of every trial: in the journal at once, in the Parquet files soon after; notifies an observer.

What happens to a trial is an event. Events come from Tune, or from the journal of a resumed search. The same code
applies both to the records.
"""

import dataclasses
import datetime
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.result import DONE, NODE_IP, PID, SHOULD_CHECKPOINT, TRIAL_ID

from tune_amp.cluster.failures import find_status
from tune_amp.cluster.trainable import metrics_of
from tune_amp.results.journal import Journal
from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.records import Provenance, SlotTime, TrialRecord, build_from, write_trials
from tune_amp.space.no_effect import find_inert
from tune_amp.trial.config import OBJECTIVES, EpochMetrics, InputError, TrialConfig, TrialStatus, describe_error

# Files are rewritten as reports come in, so that a killed search loses seconds, but not for each of thousands.
WRITE_EVERY_SECONDS = 5.0
# Writing takes at most 2 % of the time: with 2,000 trials a write takes 0.3 s.
PAUSE_PER_WRITE = 50

# Fields of a report, besides its metrics, from which the record of a trial and the study are made.
REPORTED = ("status", "error", "done", "device", "num_threads", "setup_seconds", "checkpoint_seconds")

TUNES_OWN = (DONE, NODE_IP, PID, SHOULD_CHECKPOINT, TRIAL_ID, "training_iteration")
KEPT_BY_TUNE = frozenset((*OBJECTIVES, "epoch", "status", "config_fault", *TUNES_OWN))
"""Fields of a report that Tune, the scheduler and the searcher still read once it is recorded."""


class TrialRecorder(tune.Callback):
    """Records every report of every trial, writes them to the run folder, and notifies an observer.

    Times are search time: seconds since the command of the search began, without those between a cut-off and the
    resumption.

    Args:
        folder: the run folder.
        provenance: is written into each file.
        progress: progress of the search before its first trial.
        observer: is notified of everything that happens, and raises nothing.
        journal: gets every event before it counts.
        storage_root: path below which checkpoints lie.
        slots: number of trials that can run at a time.
        begin: ``time.monotonic()`` from which slot time counts.
        explain_death: returns, in a line, why a trial's worker died.
        on_fault: is called with a line if a file cannot be written; once the journal cannot, nothing more is recorded.
        on_end: is called with the name of each trial that the journal records as over.
        on_failure: is called with all trials when one has failed.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Provenance,
        progress: SearchProgress,
        observer: Observer,
        *,
        journal: Journal,
        storage_root: str,
        slots: int,
        begin: float,
        explain_death: Callable[[Any], str],
        on_fault: Callable[[str], None],
        on_end: Callable[[str], object] = lambda name: None,
        on_failure: Callable[[Sequence[TrialRecord]], object] = lambda trials: None,
    ) -> None:
        self.folder = folder
        self._provenance = provenance
        self._progress = progress
        self._observer = observer
        self._journal, self._storage_root = journal, storage_root
        self._explain_death, self._on_fault = explain_death, on_fault
        self._on_end, self._on_failure = on_end, on_failure
        self._is_broken = False
        self._lock = threading.Lock()  # if Ray has died, another thread writes the records
        self._records: dict[str, TrialRecord] = {}  # in the order of submission
        self._began: dict[str, float] = {}  # in search time; a trial that has not begun is not shown
        self._running: set[str] = set()
        self._cut: set[str] = set()  # trials that ran when the search was cut off and have not resumed yet
        self._workers: dict[str, int] = {}  # number of each worker process, from 1
        self._places: dict[str, int] = {}  # trial id -> number of the worker that runs it
        self._slots, self._begin = slots, begin
        self._past = 0.0
        self._end: float | None = None
        self._written = time.monotonic()
        self._is_unwritten = False
        self._write_seconds = 0.0

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials that have begun, in the order of their submission."""
        return [record for trial_id, record in self._records.items() if trial_id in self._began]

    @property
    def slot_time(self) -> SlotTime | None:
        """Slots of the search and its seconds; None until it is over."""
        return None if self._end is None else SlotTime(slots=self._slots, wall_seconds=self._end)

    # ---- from a journal ----

    def replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Apply the events of earlier sessions of this search; trials that still ran then were cut off.

        Raises:
            InputError: an event breaks the rules of what it is built from.
        """
        for number, event in enumerate(events, start=2):
            try:
                self._take_over(event)
            except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
                raise InputError(f"reports.journal: line {number}: {describe_error(error)}") from error
        self._cut_off()
        self._progress = dataclasses.replace(self._progress, started=self._progress.started - self._past)

    def _take_over(self, event: Mapping[str, Any]) -> None:
        self._past = event["at"]
        if event["event"] == "session":
            self._cut_off()
        else:
            self._apply(event)

    # ---- from Tune ----

    def open_session(self, **about: Any) -> None:
        """Record that the search starts or resumes."""
        self._log("session", about={"at": self._past, **about})

    def add_trial(self, trial: Any, number: int) -> None:
        """Record a submitted trial, whose Optuna number is ``number``."""
        self._log("trial", trial.trial_id, {"name": str(trial), "config": dict(trial.config), "number": number})

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial got a worker, perhaps not its first."""
        worker = str(trial.temporary_state.ray_actor)
        if self._log("start", trial.trial_id, {"worker": worker, "time": time.time()}):
            self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a trial's report of an epoch, or of its end by an exception."""
        metrics = metrics_of(result)
        about = {name: result[name] for name in REPORTED} | {"config_fault": result.get("config_fault", False)}
        known = None if metrics is None else vars(metrics)
        if self._log("report", trial.trial_id, {"metrics": known, **about}, metrics):
            self._is_unwritten = True
            self._tell()
        # Tune lets a callback change a result. It keeps running means of every number in it, and writes them into its
        # own snapshots: for an unchanged report that is 85 kB a trial.
        for name in result.keys() - KEPT_BY_TUNE:
            del result[name]

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Write the files if a write is due. Tune calls this many times a second."""
        if self._is_unwritten:
            self._write_sometimes()

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """Record a complete checkpoint of a trial, before the previous one is deleted."""
        self._log("checkpoint", trial.trial_id, {"path": checkpoint.path.removeprefix(f"{self._storage_root}/")})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ended by its own report or by the scheduler."""
        self._end_trial(trial, find_status(trial.last_result, error=False))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial's worker died, and that the trial will be retried."""
        self._log("lost", trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end of a trial whose worker died and whose retries are used up."""
        self._log("lost", trial.trial_id)
        cause = self._explain_death(trial)
        self._end_trial(trial, find_status(None, error=True, cause=cause), cause)

    def end_unheard(self, trial_id: str, status: TrialStatus) -> None:
        """Record the end of a trial that had ended when the search was cut off, before that was recorded."""
        if self._log("end", trial_id, {"status": str(status), "error": self._find(trial_id).error}):
            self._on_end(self._find(trial_id).trial_name)

    def finish(self) -> None:
        """End the search: mark running trials as interrupted, and write everything. Slot time ends here."""
        self._end = self._now()
        self._log("finish")
        for trial_id in self._cut_off(self._end):
            self._tell(self._find(trial_id))
        self.write()

    def write(self) -> None:
        """Write the records to ``trials.parquet`` and ``epochs.parquet``."""
        began = time.monotonic()
        try:
            write_trials(self.folder, self.trials, self._provenance, self.slot_time)
        except OSError as error:  # the journal has every event
            self._on_fault(describe_error(error))
        self._written = time.monotonic()
        self._is_unwritten = False
        self._write_seconds = self._written - began

    def __getstate__(self) -> dict[str, Any]:
        """Return no state, since an open file and a live display cannot be pickled.

        Tune pickles its callbacks, but nothing reads the pickles.
        """
        return {}

    # ---- events ----

    def _log(
        self,
        kind: str,
        trial_id: str | None = None,
        about: Mapping[str, Any] = types.MappingProxyType({}),
        metrics: EpochMetrics | None = None,
    ) -> bool:
        """Write an event to the journal, then apply it; return whether that succeeded.

        An event that is not in the journal does not count.
        """
        with self._lock:
            event = {"event": kind, "at": self._now(), **({} if trial_id is None else {"trial_id": trial_id}), **about}
            try:
                if not self._is_broken:
                    self._journal.append(event)
            except OSError as error:
                self._is_broken = True
                self._on_fault(describe_error(error))
            if not self._is_broken:
                self._apply(event, metrics)
            return not self._is_broken

    def _apply(self, event: Mapping[str, Any], metrics: EpochMetrics | None = None) -> None:
        kind = event["event"]
        if kind in ("session", "finish"):
            return
        trial_id = event["trial_id"]
        if kind == "trial":
            self._add(event)
        elif kind == "start":
            self._start(trial_id, event)
        elif kind == "report":
            told = event["metrics"]
            self._report(trial_id, event, build_from(EpochMetrics, told) if told and metrics is None else metrics)
        elif kind == "lost":
            self._places.pop(trial_id, None)
        elif kind == "end":
            self._running.discard(trial_id)
            self._places.pop(trial_id, None)
            error = event["error"] or self._find(trial_id).error
            self._record(trial_id, event["at"], status=TrialStatus(event["status"]), error=error)

    def _add(self, event: Mapping[str, Any]) -> None:
        """Add a trial in the order of submission, which breaks ties: workers start in any order."""
        if event["trial_id"] in self._records:
            return  # submitted again by a resumed search
        config = build_from(TrialConfig, event["config"])
        self._records[event["trial_id"]] = TrialRecord(
            trial_id=event["trial_id"],
            trial_name=event["name"],
            status=TrialStatus.INTERRUPTED,
            config=config,
            epochs=(),
            inert=find_inert(config, self._provenance.train_images),
            wall_seconds=0.0,
            device="",
            num_threads=0,
        )

    def _start(self, trial_id: str, event: Mapping[str, Any]) -> None:
        self._places[trial_id] = self._workers.setdefault(event["worker"], len(self._workers) + 1)
        self._slots = max(self._slots, len(self._places))  # nodes may have joined
        self._running.add(trial_id)
        if trial_id in self._cut:  # the time between does not count as the trial's
            self._cut.discard(trial_id)
            self._began[trial_id] = event["at"] - self._find(trial_id).wall_seconds
        if trial_id not in self._began:
            started = datetime.datetime.fromtimestamp(event["time"], datetime.UTC)
            self._record(trial_id, event["at"], started=started)

    def _report(self, trial_id: str, event: Mapping[str, Any], metrics: EpochMetrics | None) -> None:
        epochs = self._find(trial_id).epochs
        if metrics is not None:
            is_last = event["status"] in (TrialStatus.COMPLETED, TrialStatus.DIVERGED)
            epochs = place_epoch(epochs, metrics, is_last=is_last)
        self._record(
            trial_id,
            event["at"],
            epochs=epochs,
            error=event["error"],
            config_fault=event["config_fault"],
            device=event["device"],
            num_threads=event["num_threads"],
            setup_seconds=event["setup_seconds"],
            checkpoint_seconds=event["checkpoint_seconds"],
            worker=self._places[trial_id],
        )

    def _cut_off(self, now: float | None = None) -> list[str]:
        """Mark running trials as interrupted by the end of the search or of its process, and return their ids."""
        now = self._past if now is None else now
        cut = [trial_id for trial_id in self._records if trial_id in self._running]
        for trial_id in cut:
            self._record(trial_id, now)
        self._running.clear()
        self._places.clear()
        self._cut.update(cut)
        return cut

    def _end_trial(self, trial: Any, status: TrialStatus, error: str | None = None) -> None:
        # Nothing reads Tune's running means of a trial that is over, but they stay in memory until the search ends.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        if self._log("end", trial.trial_id, {"status": str(status), "error": error}):
            self._is_unwritten = True
            if status is not TrialStatus.INTERRUPTED:
                self._on_end(str(trial))
            self._tell(self._find(trial.trial_id))
            if status is TrialStatus.FAILED:
                self._on_failure(self.trials)

    def _find(self, trial_id: str) -> TrialRecord:
        return self._records[trial_id]

    def _record(self, trial_id: str, now: float, **changes: Any) -> None:
        """Change the record of a trial, which begins now at the latest: its worker may have died before its start."""
        seconds = now - self._began.setdefault(trial_id, now)
        self._records[trial_id] = dataclasses.replace(self._find(trial_id), wall_seconds=seconds, **changes)

    def _now(self) -> float:
        return self._past + time.monotonic() - self._begin

    def _write_sometimes(self) -> None:
        if time.monotonic() - self._written >= max(WRITE_EVERY_SECONDS, PAUSE_PER_WRITE * self._write_seconds):
            self.write()

    def _tell(self, ended: TrialRecord | None = None) -> None:
        now = dataclasses.replace(self._progress, trials=tuple(self.trials), running=frozenset(self._running))
        self._observer.on_progress(now, ended)


def place_epoch(epochs: Sequence[EpochMetrics], metrics: EpochMetrics, *, is_last: bool) -> tuple[EpochMetrics, ...]:
    """Return the epochs of a trial after one more report.

    A retried trial reports epochs again. Each report replaces the earlier one of the same epoch, and epochs that it has
    yet to reach keep theirs until then, so every reported epoch stands once. None stand after the last epoch of a trial
    that has ended.

    Args:
        epochs: the epochs so far, in order.
        metrics: the report.
        is_last: whether the trial ended with it.
    """
    before = [earlier for earlier in epochs if earlier.epoch < metrics.epoch]
    after = [] if is_last else [earlier for earlier in epochs if earlier.epoch > metrics.epoch]
    return (*before, metrics, *after)
