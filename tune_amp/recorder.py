"""Keeps every report of every trial, writes them every few seconds, and tells whoever watches."""

import dataclasses
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from tune_amp.config import TrialConfig, TrialStatus
from tune_amp.inert import find_inert
from tune_amp.results import Provenance, TrialRecord, write_trials
from tune_amp.searcher import find_cause, find_status
from tune_amp.trainable import metrics_of

# Files are rewritten as reports come in, so that a killed search loses seconds, but not for every one of thousands.
WRITE_EVERY_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """A search as it stands, for whoever shows it."""

    run: str
    model: str
    dataset: str
    objectives: tuple[str, ...]
    num_samples: int
    """Trials that the search will make."""
    time_budget: float | None
    """Seconds after which they are interrupted, or None."""
    started: float
    """``time.monotonic()`` when the search began."""
    trials: Sequence[TrialRecord] = ()
    """Every trial so far. One still running bears the status it would end with if all stopped now: interrupted."""
    running: frozenset[str] = frozenset()
    """Trial ids of the running ones."""

    def count_ended(self) -> int:
        """Trials that are over."""
        return sum(trial.trial_id not in self.running for trial in self.trials)


class Observer(Protocol):
    """Shows a search to its user."""

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        """A trial started, reported, or (``ended``) came to its end."""


class TrialRecorder(tune.Callback):
    """Keeps every report of every trial, writes them to the run folder, and tells an observer.

    Args:
        folder: the run folder.
        provenance: goes into each file.
        progress: the search before its first trial.
        observer: is told of everything that happens.
    """

    def __init__(self, folder: Path, provenance: Provenance, progress: SearchProgress, observer: Observer) -> None:
        self._folder = folder
        self._provenance = provenance
        self._progress = progress
        self._observer: Observer | None = observer
        self._trials: dict[str, TrialRecord] = {}
        self._places: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._running: set[str] = set()
        self._written = time.monotonic()

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials in the order of their submission."""
        return sorted(self._trials.values(), key=lambda trial: self._places[trial.trial_id])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial got its worker, perhaps not for the first time."""
        for submitted in trials:  # workers start in any order
            self._places.setdefault(submitted.trial_id, len(self._places))
        self._add(trial)
        self._running.add(trial.trial_id)
        self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported an epoch, or its end by an exception."""
        record = self._trials[trial.trial_id]
        metrics = metrics_of(result)
        epochs = record.epochs
        if metrics is not None:
            # A trial that was tried again reports epochs anew: the later report stands.
            epochs = (*(earlier for earlier in epochs if earlier.epoch < metrics.epoch), metrics)
        # Tried again, the worker counts anew; the trial began with its first attempt.
        started = self._started.setdefault(trial.trial_id, result["started"])
        self._trials[trial.trial_id] = dataclasses.replace(
            record,
            epochs=epochs,
            error=result["error"],
            started=datetime.datetime.fromtimestamp(started, datetime.UTC),
            wall_seconds=result["started"] + result["wall_seconds"] - started,
            device=result["device"],
            num_threads=result["num_threads"],
        )
        self._write_sometimes()
        self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by its own report, or by the scheduler."""
        self._end(trial, status=find_status(trial.last_result, error=False))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's worker died more often than it is tried again."""
        cause = find_cause(trial)
        self._end(trial, status=find_status(None, error=True, cause=cause), error=cause)

    def finish(self) -> None:
        """The search is over: what still runs was interrupted, and everything is written."""
        for trial_id in sorted(self._running, key=self._places.__getitem__):
            record = self._trials[trial_id]
            assert record.started is not None  # set on its start
            seconds = (datetime.datetime.now(datetime.UTC) - record.started).total_seconds()
            self._trials[trial_id] = dataclasses.replace(record, wall_seconds=max(record.wall_seconds, seconds))
            self._running.discard(trial_id)
            self._tell(self._trials[trial_id])
        self.write()

    def write(self) -> None:
        """Write what is known to ``trials.parquet`` and ``epochs.parquet``."""
        write_trials(self._folder, self.trials, self._provenance)
        self._written = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a live display cannot be."""
        return {**self.__dict__, "_observer": None}

    def _add(self, trial: Any) -> None:
        self._places.setdefault(trial.trial_id, len(self._places))
        if trial.trial_id not in self._trials:
            config = TrialConfig(**trial.config)
            self._trials[trial.trial_id] = TrialRecord(
                trial_id=trial.trial_id,
                trial_name=str(trial),
                status=TrialStatus.INTERRUPTED,
                config=config,
                epochs=(),
                inert=find_inert(config, self._provenance.train_images),
                started=datetime.datetime.now(datetime.UTC),
                wall_seconds=0.0,
                device="",
                num_threads=0,
            )

    def _end(self, trial: Any, **changes: Any) -> None:
        self._add(trial)  # its worker may have died before the trial started
        self._running.discard(trial.trial_id)
        self._trials[trial.trial_id] = dataclasses.replace(self._trials[trial.trial_id], **changes)
        self._write_sometimes()
        self._tell(self._trials[trial.trial_id])

    def _write_sometimes(self) -> None:
        if time.monotonic() - self._written >= WRITE_EVERY_SECONDS:
            self.write()

    def _tell(self, ended: TrialRecord | None = None) -> None:
        if self._observer is not None:
            now = dataclasses.replace(self._progress, trials=self.trials, running=frozenset(self._running))
            try:
                self._observer.on_progress(now, ended)
            except BrokenPipeError:  # whoever watched is gone; the search goes on
                self._observer = None
