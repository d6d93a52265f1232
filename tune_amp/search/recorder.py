"""Records every report of every trial, in the journal at once and in Parquet files soon after; notifies an observer."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.result import DONE

from tune_amp.cluster.failures import find_status
from tune_amp.cluster.trainable import REPORT
from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.records import SlotTime, TrialRecord, write_trials
from tune_amp.search.history import RunHistory
from tune_amp.trial.config import TrialConfig, TrialStatus
from tune_amp.trial.report import TrialReport
from tune_amp.trial.text import describe_error

# Files are rewritten as reports come in, so that a killed search loses seconds, but not for each of thousands.
WRITE_EVERY_SECONDS = 5.0
# Writing takes at most 2 % of the time: with 2,000 trials a write takes 0.3 s.
PAUSE_PER_WRITE = 50


class TrialRecorder(tune.Callback):
    """Records every report of every trial, writes them to the run folder, and notifies an observer.

    Times are search time: seconds since the command of the search began, without those between a cut-off and the
    resumption.

    Args:
        folder: the run folder.
        history: gets every event once it is in the journal.
        progress: progress of the search before its first trial of this session.
        observer: is notified of everything that happens, and raises nothing.
        storage_root: path below which checkpoints lie.
        begin: ``time.monotonic()`` from which slot time counts.
        explain_death: returns, in a line, why a trial's worker died.
        on_fault: is called with a line if a file cannot be written; once the journal cannot, nothing more is recorded.
        on_end: is called with the name of each trial that the journal records as over.
        on_failure: is called with all trials when one has failed.
    """

    def __init__(
        self,
        folder: Path,
        history: RunHistory,
        progress: SearchProgress,
        observer: Observer,
        *,
        storage_root: str,
        begin: float,
        explain_death: Callable[[Any], str],
        on_fault: Callable[[str], None],
        on_end: Callable[[str], object] = lambda name: None,
        on_failure: Callable[[Sequence[TrialRecord]], object] = lambda trials: None,
    ) -> None:
        self._folder = folder
        self._history = history
        self._progress = dataclasses.replace(progress, started=progress.started - history.seconds)
        self._observer = observer
        self._storage_root = storage_root
        self._explain_death, self._on_fault = explain_death, on_fault
        self._on_end, self._on_failure = on_end, on_failure
        self._is_broken = False
        self._lock = threading.Lock()  # if Ray has died, another thread writes the records
        self._begin = begin - history.seconds  # in search time, the zero
        self._end: float | None = None
        self._written = time.monotonic()
        self._is_unwritten = False
        self._write_seconds = 0.0

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials that have begun, in the order of their submission."""
        return self._history.records

    @property
    def slot_time(self) -> SlotTime | None:
        """Slots of the search and its seconds; None until it is over."""
        if self._end is None:
            return None
        # Nodes may have joined.
        return SlotTime(slots=max(self._progress.slots, self._history.most_running), wall_seconds=self._end)

    def open_session(self, **about: Any) -> None:
        """Record that the search starts or resumes."""
        self._log("session", at=self._history.seconds, **about)

    def add_trial(self, trial: Any, number: int, config: TrialConfig) -> None:
        """Record a submitted trial, whose Optuna number is ``number``."""
        self._log("trial", config, trial_id=trial.trial_id, name=str(trial), config=vars(config), number=number)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial got a worker, perhaps not its first."""
        if self._log("start", trial_id=trial.trial_id, worker=str(trial.temporary_state.ray_actor), time=time.time()):
            self._notify()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a trial's report of an epoch, or of its end by an exception."""
        report = dataclasses.replace(result[REPORT], done=result[DONE])  # the scheduler may have stopped the trial
        about = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        about["metrics"] = report.metrics and vars(report.metrics)
        if self._log("report", report, trial_id=trial.trial_id, **about):
            self._is_unwritten = True
            self._notify()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Write the files if a write is due. Tune calls this many times a second."""
        pause = max(WRITE_EVERY_SECONDS, PAUSE_PER_WRITE * self._write_seconds)
        if self._is_unwritten and time.monotonic() - self._written >= pause:
            self.write()

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        """Record a complete checkpoint of a trial, before the previous one is deleted."""
        self._log("checkpoint", trial_id=trial.trial_id, path=checkpoint.path.removeprefix(f"{self._storage_root}/"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ended by its own report or by the scheduler."""
        self._end_trial(trial, find_status(trial.last_result, error=False))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial's worker died, and that the trial will be retried."""
        self._log("lost", trial_id=trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record the end of a trial whose worker died and whose retries are used up."""
        self._log("lost", trial_id=trial.trial_id)
        cause = self._explain_death(trial)
        self._end_trial(trial, find_status(None, error=True, cause=cause), cause)

    def record_end(self, trial_id: str, status: TrialStatus) -> None:
        """Record the end of a trial that had ended when the search was cut off, before that was recorded."""
        record = self._history.find(trial_id).record
        if self._log("end", trial_id=trial_id, status=str(status), error=record.error):
            self._on_end(record.trial_name)

    def finish(self) -> None:
        """End the search: mark running trials as interrupted, and write everything. Slot time ends here."""
        self._end = self._now()
        self._log("finish")
        for record in self._history.cut_off(self._end):
            self._notify(record)
        self.write()

    def write(self) -> None:
        """Write the records to ``trials.parquet`` and ``epochs.parquet``."""
        began = time.monotonic()
        try:
            write_trials(self._folder, self.trials, self._history.provenance, self.slot_time)
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

    def _log(self, kind: str, value: TrialConfig | TrialReport | None = None, **about: Any) -> bool:
        """Write an event to the journal, then to the history; return whether that succeeded.

        An event that is not in the journal does not count.
        """
        with self._lock:
            if not self._is_broken:
                event = {"event": kind, "at": self._now(), **about}
                try:
                    self._history.journal.append(event)
                    self._history.apply(event, value)
                except OSError as error:
                    self._is_broken = True
                    self._on_fault(describe_error(error))
            return not self._is_broken

    def _end_trial(self, trial: Any, status: TrialStatus, error: str | None = None) -> None:
        _drop_details(trial)
        if self._log("end", trial_id=trial.trial_id, status=str(status), error=error):
            self._is_unwritten = True
            if status is not TrialStatus.INTERRUPTED:
                self._on_end(str(trial))
            self._notify(self._history.find(trial.trial_id).record)
            if status is TrialStatus.FAILED:
                self._on_failure(self.trials)

    def _now(self) -> float:
        return time.monotonic() - self._begin

    def _notify(self, ended: TrialRecord | None = None) -> None:
        # Trials that were cut off have not ended: they wait until they are resumed.
        waiting = self._history.waiting if self._end is None else ()
        trials = tuple(trial for trial in self.trials if trial.trial_id not in waiting)
        now = dataclasses.replace(self._progress, trials=trials, running=frozenset(self._history.running))
        self._observer.on_progress(now, ended)


def _drop_details(trial: Any) -> None:
    """Drop what nothing reads of a trial that is over: its running means, and the report in its last result.

    Tune keeps each trial until the search ends, in memory and as the text of a snapshot: 8.4 kB a trial, and 6.2 kB so.
    """
    trial.run_metadata.metric_analysis.clear()
    trial.run_metadata.metric_n_steps.clear()
    (trial.run_metadata.last_result or {}).pop(REPORT, None)
