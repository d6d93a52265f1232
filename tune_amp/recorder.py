"""Keeps every report of every trial, writes them every few seconds, and tells whoever watches."""

import bisect
import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.result import DONE, NODE_IP, PID, SHOULD_CHECKPOINT, TRIAL_ID

from tune_amp.config import OBJECTIVES, TrialConfig, TrialStatus
from tune_amp.inert import find_inert
from tune_amp.ledger import Ledger, SlotTimes, TimeKind, TrialTime, build_ledger
from tune_amp.results import Provenance, TrialRecord, write_trials
from tune_amp.searcher import find_cause, find_status
from tune_amp.trainable import metrics_of

# Files are rewritten as reports come in, so that a killed search loses seconds, but not for every one of thousands.
WRITE_EVERY_SECONDS = 5.0
# And not for more than 2 % of the time: with 2,000 trials a write takes 0.3 s.
PAUSE_PER_WRITE = 50

TUNES_OWN = (DONE, NODE_IP, PID, SHOULD_CHECKPOINT, TRIAL_ID, "training_iteration")
KEPT_BY_TUNE = frozenset((*OBJECTIVES, "epoch", "status", "config_fault", *TUNES_OWN))
"""What Tune, the scheduler and the searcher still read of a report once it is recorded."""


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
    slot_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Slot time by ``TimeKind`` that workers told of so far; see ``SlotTimes.totals``."""

    def count_ended(self) -> int:
        """Trials that are over."""
        return len(self.trials) - len(self.running)


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
        slots: places in which trials run at a time.
        begin: ``time.monotonic()`` from which their time counts.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Provenance,
        progress: SearchProgress,
        observer: Observer,
        *,
        slots: int,
        begin: float,
    ) -> None:
        self._folder = folder
        self._provenance = provenance
        self._progress = progress
        self._observer: Observer | None = observer
        # Reports come in by the thousand: none may cost more where there are more trials.
        self._places: dict[str, int] = {}
        self._recorded: list[int] = []  # the places of those in _records, in order
        self._records: list[TrialRecord] = []
        self._started: dict[str, float] = {}
        self._running: set[str] = set()
        self._times = SlotTimes()
        self._slots, self._begin = slots, begin
        self._end: float | None = None
        self._written = time.monotonic()
        self._write_seconds = 0.0

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials in the order of their submission."""
        return list(self._records)

    @property
    def ledger(self) -> Ledger | None:
        """What the slots spent their time on, once the search is over."""
        if self._end is None:
            return None
        return build_ledger(
            self._times.workers,
            map(self._time_trial, self._records),
            slots=self._slots,
            begin=self._begin,
            end=self._end,
        )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial got its worker, perhaps not for the first time."""
        self._place(trials)
        self._add(trial)
        self._times.start(trial.trial_id, str(trial.temporary_state.ray_actor), time.monotonic())
        self._running.add(trial.trial_id)
        self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported an epoch, or its end by an exception."""
        record = self._find(trial.trial_id)
        metrics = metrics_of(result)
        epochs = record.epochs
        if metrics is not None:
            # A trial that was tried again reports epochs anew: the later report stands.
            epochs = (*(earlier for earlier in epochs if earlier.epoch < metrics.epoch), metrics)
        # Tried again, the worker counts anew; the trial began with its first attempt.
        started = self._started.setdefault(trial.trial_id, result["started"])
        worker = self._times.report(trial.trial_id, result["spent"], time.monotonic())
        self._change(
            trial.trial_id,
            epochs=epochs,
            error=result["error"],
            started=datetime.datetime.fromtimestamp(started, datetime.UTC),
            wall_seconds=result["started"] + result["wall_seconds"] - started,
            device=result["device"],
            num_threads=result["num_threads"],
            setup_seconds=result["setup_seconds"],
            checkpoint_seconds=result["checkpoint_seconds"],
            worker=worker,
        )
        # Tune lets a callback change a result. It keeps running means of every number in it, and writes them into its
        # own snapshots: of a report as it comes that is 85 kB a trial.
        for name in result.keys() - KEPT_BY_TUNE:
            del result[name]
        self._write_sometimes()
        self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by its own report, or by the scheduler."""
        self._end_trial(trial, status=find_status(trial.last_result, error=False))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's worker died, and the trial will be tried again."""
        self._times.lose(trial.trial_id, time.monotonic())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's worker died more often than it is tried again."""
        self._times.lose(trial.trial_id, time.monotonic())
        cause = find_cause(trial)
        self._end_trial(trial, status=find_status(None, error=True, cause=cause), error=cause)

    def finish(self) -> None:
        """The search is over: what still runs was interrupted, and everything is written. Slot time ends here."""
        self._end = time.monotonic()
        for trial_id in sorted(self._running, key=self._places.__getitem__):
            self._times.lose(trial_id, self._end, TimeKind.INTERRUPTED)
            record = self._find(trial_id)
            assert record.started is not None  # set on its start
            seconds = (datetime.datetime.now(datetime.UTC) - record.started).total_seconds()
            self._running.discard(trial_id)
            self._tell(self._change(trial_id, wall_seconds=max(record.wall_seconds, seconds)))
        self.write()

    def write(self) -> None:
        """Write what is known to ``trials.parquet`` and ``epochs.parquet``."""
        began = time.monotonic()
        write_trials(self._folder, self._records, self._provenance, self.ledger)
        self._written = time.monotonic()
        self._write_seconds = self._written - began

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a live display cannot be."""
        return {**self.__dict__, "_observer": None}

    def _place(self, trials: Sequence[Any]) -> None:
        """Note the order in which trials were submitted: workers start in any order, and ties are broken by it.

        Tune tells all trials each time, the new ones towards the end.
        """
        unknown: list[str] = []
        for trial in reversed(trials):
            if len(self._places) + len(unknown) >= len(trials):
                break
            if trial.trial_id not in self._places:
                unknown.append(trial.trial_id)
        for trial_id in reversed(unknown):
            self._places[trial_id] = len(self._places)

    def _find(self, trial_id: str) -> TrialRecord:
        return self._records[bisect.bisect_left(self._recorded, self._places[trial_id])]

    def _change(self, trial_id: str, **changes: Any) -> TrialRecord:
        index = bisect.bisect_left(self._recorded, self._places[trial_id])
        self._records[index] = dataclasses.replace(self._records[index], **changes)
        return self._records[index]

    def _time_trial(self, record: TrialRecord) -> TrialTime:
        last, kinds = record.last, {"train": TimeKind.TRAINING, "val": TimeKind.VALIDATION, "probe": TimeKind.PROBE}
        kept = {} if last is None else {kind: getattr(last, f"{name}_seconds") for name, kind in kinds.items()}
        return TrialTime(status=record.status, spent=self._times.find_work(record.trial_id), kept=kept)

    def _add(self, trial: Any) -> None:
        place = self._places.setdefault(trial.trial_id, len(self._places))
        index = bisect.bisect_left(self._recorded, place)
        if self._recorded[index : index + 1] != [place]:
            config = TrialConfig(**trial.config)
            record = TrialRecord(
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
            self._recorded.insert(index, place)
            self._records.insert(index, record)

    def _end_trial(self, trial: Any, **changes: Any) -> None:
        self._add(trial)  # its worker may have died before the trial started
        self._running.discard(trial.trial_id)
        # Nothing reads Tune's running means of a trial that is over, and they stay for as long as the search lasts.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        record = self._change(trial.trial_id, **changes)
        self._write_sometimes()
        self._tell(record)

    def _write_sometimes(self) -> None:
        if time.monotonic() - self._written >= max(WRITE_EVERY_SECONDS, PAUSE_PER_WRITE * self._write_seconds):
            self.write()

    def _tell(self, ended: TrialRecord | None = None) -> None:
        if self._observer is not None:
            now = dataclasses.replace(
                self._progress,
                trials=tuple(self._records),
                running=frozenset(self._running),
                slot_seconds=self._times.totals,
            )
            try:
                self._observer.on_progress(now, ended)
            except BrokenPipeError:  # whoever watched is gone; the search goes on
                self._observer = None
