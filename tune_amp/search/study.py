"""Asks Optuna for trials, and reports the outcome of each.

Ray's OptunaSearch reports every trial that ASHA stopped as complete, leaves one whose metric is NaN running for ever,
and reports a crash as a failure that the sampler forgets. Here each outcome is reported as what it is.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from tune_amp.cluster.failures import find_status
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RecordedTrial
from tune_amp.search.samplers import build_sampler, reseed
from tune_amp.search.schedulers import find_worst_value, is_hopeless
from tune_amp.search.warm_start import OldTrial, WarmStart, find_suggestion
from tune_amp.space.space import SearchSpace
from tune_amp.trial.config import HOPELESS_STATUSES, InputError, TrialConfig, TrialStatus, is_finite
from tune_amp.trial.consent import check_consent
from tune_amp.trial.objectives import is_maximized, metric_of
from tune_amp.trial.text import describe_error

STATUS_ATTRIBUTE = "status"
SUGGESTED_BY_ATTRIBUTE = "suggested by run"
OF_RUN_ATTRIBUTE = "of run"
FIXED_PARAMS = "fixed_params"
"""Optuna's own name for the parameters with which a trial was enqueued."""
CONSTRAINTS_PREFIX = "constraints:"
"""Prefix of Optuna's own names for a trial's constraints."""
HOPELESS_CONSTRAINT = "hopeless"
"""Name of the constraint that is 1 if a trial was hopeless, else 0. It is the same for every reason, as GPSampler
requires the same constraints of all trials."""

# A hopeless trial's values for GP if no trial has completed yet: worse than chance, but on the scale of real values.
UNKNOWN_VALUES = {"val_accuracy": 0.0, "val_loss": 10.0}

# Trials that a rebuilt study may lack: those of a warm start, and those that were submitted again.
MOST_LOST_TRIALS = 10_000


class AmpSearch:
    """Suggests trials by Optuna, and reports the true end of each.

    - completed: its values, at the full budget;
    - stopped: pruned, with the epoch it reached and its values on the way;
    - diverged, out of memory, or failed through the fault of its settings (refused by tune_amp's checks, or the same
      error twice): complete with the worst value and an infeasible constraint, which TPE ranks below every other trial
      (the rank of a pruned one would depend on how long it ran);
    - failed otherwise, or interrupted: failed, which the sampler does not count, since the settings are not to blame.

    The first trial has the default settings, or the nearest that the space has: no search should end worse than they
    do. The suggestions of a warm start come next. Its old trials are in the study from the beginning, and only the
    sampler uses them.

    A resumed search finds its study as it left it: trials that ended keep their state, those that were cut off stay
    running, and the sampler draws what it would have drawn. A lost study is rebuilt from the recorded trials, but
    without what CMA-ES and NSGA-II keep in it, and without what a warm start put there.

    Args:
        space: what is searched.
        shared: the ``TrialConfig`` fields that all trials have in common.
        train_images: images of the training split, by which relative settings are counted.
        objectives: what is optimized, see ``trial.objectives``; for several, the result is a Pareto set.
        seed: seed of the sampler.
        folder: folder of the study, which is in Optuna's own journal file, for ``optuna-dashboard`` to open.
        study_name: the run's name.
        sampler: one of ``SAMPLERS``.
        num_samples: trials of the whole search as it was started.
        warm_start: what is used of an earlier run, if anything is.
        past: the recorded trials of a resumed search; ``mend_run`` has checked their study.
        on_fault: is called with a line if the study cannot be written; None: the OSError is raised.

    Raises:
        InputError: the sampler does not apply, or a recorded trial has settings that the space cannot give.
    """

    def __init__(
        self,
        space: SearchSpace,
        shared: Mapping[str, Any],
        *,
        train_images: int,
        objectives: Sequence[str],
        seed: int,
        folder: Path,
        study_name: str,
        sampler: str = "tpe",
        num_samples: int,
        warm_start: WarmStart | None = None,
        past: Sequence[RecordedTrial] = (),
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna would log every study and trial
        path = RunFolder(folder).study
        if not past:  # a search cut off before its first trial may have enqueued half of what is enqueued below
            path.unlink(missing_ok=True)
        built = build_sampler(sampler, space, seed=seed, num_samples=num_samples)
        self._objectives = tuple(objectives)
        self._metrics = [metric_of(objective) for objective in objectives]
        self._models_values = sampler == "gp"
        self._seed, self._suggested = seed, len(past)
        self._space, self._shared = space, dict(shared)
        self._sizes = {"train_images": train_images, "max_epochs": shared["max_epochs"]}
        self._on_fault = on_fault
        self._trials: dict[str, optuna.Trial] = {}
        self._ended: set[str] = set()
        self._reported_epochs: dict[str, int] = {}
        self.study = optuna.create_study(
            storage=open_storage(path),
            sampler=built,
            study_name=study_name,
            directions=["maximize" if is_maximized(name) else "minimize" for name in objectives],
            load_if_exists=True,
        )
        if self.study.metric_names is None:  # optuna-dashboard shows them
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names(self._metrics)
        if past:
            check_consent(str(path), sampler=sampler)
            if not self.study.get_trials(deepcopy=False):
                self._rebuild(past)
            self._resume(past)
        else:
            self.study.enqueue_trial(space.find_defaults(**self._sizes))
            if warm_start is not None:
                self._add_warm_start(warm_start)

    def suggest(self, trial_id: str) -> TrialConfig:
        """Return the configuration of the next trial.

        Raises:
            OSError: the study cannot be written.
        """
        reseed(self.study.sampler, self._seed, self._suggested)
        trial = self._trials[trial_id] = self.study.ask()
        self._suggested += 1
        # The searched and fixed settings of the space, the shared ones, and defaults for the rest.
        return TrialConfig(**{**self._shared, **self._space.suggest(trial, **self._sizes)})

    def find_number(self, trial_id: str) -> int:
        """Return Optuna's number of a trial."""
        return int(self._trials[trial_id].number)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report the first objective of an epoch to the study."""
        value = result.get(self._metrics[0])
        if is_finite(value) and trial_id not in self._ended:
            with self._reporting_faults():
                self._report(trial_id, value, result["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False, cause: str = ""
    ) -> None:
        """Report to the study how a trial ended; for the arguments, see ``find_status``."""
        if trial_id not in self._ended:
            self._end(trial_id, result, find_status(result, error=error, cause=cause))

    def close(self) -> None:
        """Report every unfinished trial as interrupted, so that none stays running in the study."""
        for trial_id in self._trials.keys() - self._ended:
            self.on_trial_complete(trial_id)

    def _rebuild(self, past: Sequence[RecordedTrial]) -> None:
        """Add each recorded trial under its number, as it ran, to a study that was lost.

        Other numbers stood for no trial of this run, or for one that was withdrawn; they get failed trials.
        """
        by_number = {trial.number: trial for trial in past}
        last = max(by_number)
        if last > MOST_LOST_TRIALS + 10 * len(past):  # each takes a write
            raise InputError(f"reports.journal: number: must be near the {len(past)} trials, got {last}")
        failed = optuna.trial.create_trial(state=TrialState.FAIL)
        for number in range(last + 1):
            self.study.add_trial(self._recreate(by_number[number]) if number in by_number else failed)

    def _recreate(self, past: RecordedTrial) -> FrozenTrial:
        suggestion = find_suggestion(past.config, self._space, self._sizes["train_images"], **self._sizes)
        reports = {epoch: metrics.find_value(self._objectives[0]) for epoch, metrics in past.first_metrics.items()}
        if past.report is not None and past.report.done and past.report.metrics is not None:
            reports.pop(past.report.metrics.epoch, None)  # the end decides whether that epoch counts
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=suggestion.params,
            distributions=suggestion.distributions,
            intermediate_values=self._select_reports(reports),
        )

    def _resume(self, past: Sequence[RecordedTrial]) -> None:
        """Find each recorded trial in the study, and fail those that the journal lacks.

        The sampler would mistake trials that a killed process left running for bad ones.
        """
        stored = self.study.get_trials(deepcopy=False)
        numbers, trial_ids = {trial.number for trial in past}, {trial.trial_id for trial in past}
        for recorded in past:
            self._match_stored(recorded, stored[recorded.number])
        for trial in stored:
            running = trial.state is TrialState.RUNNING and trial.number not in numbers
            # The study has its end, but the journal lacks its beginning: the disk was full.
            ended = trial.state is TrialState.FAIL and trial.user_attrs.get("trial_id", "") not in trial_ids | {""}
            if running or ended:
                self._requeue_orphan(trial, stored[trial.number + 1 :])

    def _match_stored(self, past: RecordedTrial, stored: FrozenTrial) -> None:
        if past.status is None and _was_interrupted(stored, past):
            stored = self._add_again(past, stored)
        self._trials[past.trial_id] = optuna.trial.Trial(self.study, stored._trial_id)  # noqa: SLF001 - Optuna's own way
        self._reported_epochs[past.trial_id] = max(stored.intermediate_values, default=0)
        if stored.state.is_finished():
            self._ended.add(past.trial_id)
        elif past.status is not None:
            self._end(past.trial_id, past.last_result, past.status)

    def _add_again(self, past: RecordedTrial, ended: FrozenTrial) -> FrozenTrial:
        """Add a resumed trial, which the study holds as ended, once more as running; return the new trial."""
        running = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=ended.params,
            distributions=ended.distributions,
            intermediate_values=ended.intermediate_values,
            # NSGA-II keeps a trial's generation there. The parameters of an enqueued trial are not requested twice.
            system_attrs={
                name: value
                for name, value in ended.system_attrs.items()
                if name != FIXED_PARAMS and not name.startswith(CONSTRAINTS_PREFIX)
            },
            user_attrs={name: value for name, value in ended.user_attrs.items() if name != STATUS_ATTRIBUTE},
        )
        self.study.add_trial(running)
        if ended.state is TrialState.RUNNING:  # the process was killed while it reported the end
            self.study.tell(ended.number, state=TrialState.FAIL)
        again: FrozenTrial = self.study.get_trials(deepcopy=False)[-1]
        past.number = again.number
        return again

    def _requeue_orphan(self, orphan: FrozenTrial, later: Sequence[FrozenTrial]) -> None:
        """Fail a trial that the journal lacks; if it was enqueued, enqueue its parameters again, unless they were."""
        fixed = orphan.system_attrs.get(FIXED_PARAMS)
        if fixed and fixed not in [trial.system_attrs.get(FIXED_PARAMS) for trial in later]:
            kept = {name: value for name, value in orphan.user_attrs.items() if name == SUGGESTED_BY_ATTRIBUTE}
            self.study.enqueue_trial(fixed, user_attrs=kept)
        if orphan.state is TrialState.RUNNING:
            self.study.tell(orphan.number, state=TrialState.FAIL)

    @contextlib.contextmanager
    def _reporting_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._on_fault is None:
                raise
            self._on_fault(describe_error(error))

    def _end(self, trial_id: str, result: Mapping[str, Any] | None, status: TrialStatus) -> None:
        with self._reporting_faults():
            self._tell(trial_id, result or {}, status)
            self._ended.add(trial_id)

    def _tell(self, trial_id: str, result: Mapping[str, Any], status: TrialStatus) -> None:
        trial = self._trials[trial_id]
        trial.set_user_attr(STATUS_ATTRIBUTE, str(status))
        trial.set_user_attr("trial_id", trial_id)
        stopped = status is TrialStatus.STOPPED
        is_result = stopped or status is TrialStatus.COMPLETED
        by_settings = status in HOPELESS_STATUSES or (status is TrialStatus.FAILED and result.get("config_fault"))
        values = [result[name] for name in self._metrics if is_finite(result.get(name))]
        if by_settings or (is_result and is_hopeless(result)):
            self._tell_values(trial, self._hopeless_values(), hopeless=True)
        elif not is_result or len(values) < len(self._objectives) or (stopped and len(values) > 1):
            # With several objectives, Optuna keeps no value of a trial that was stopped.
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            # Tune passes on a trial's end instead of its last epoch, so that epoch is reported here.
            self._report(trial_id, values[0], result["epoch"])
            if stopped:
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self._tell_values(trial, values, hopeless=False)

    def _add_warm_start(self, warm_start: WarmStart) -> None:
        """Enqueue an earlier run's winners, and add its trials with their true ends, as for trials of this run."""
        run = warm_start.donor.provenance.run
        for suggestion in warm_start.suggestions:
            self.study.enqueue_trial(dict(suggestion), user_attrs={SUGGESTED_BY_ATTRIBUTE: run})
        # Hopeless ones last: their values for GP depend on the others.
        for old in sorted(warm_start.old_trials, key=_is_old_hopeless):
            self._add_old_trial(old, run)

    def _add_old_trial(self, old: OldTrial, run: str) -> None:
        record, hopeless = old.record, _is_old_hopeless(old)
        pruned = record.status is TrialStatus.STOPPED and not hopeless
        reports = {epoch.epoch: epoch.find_value(self._objectives[0]) for epoch in record.epochs}
        values = [record.last.find_value(name) if record.last else None for name in self._objectives]
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                values=self._hopeless_values() if hopeless else cast("list[float]", values),
                params=old.suggestion.params,
                distributions=old.suggestion.distributions,
                intermediate_values=self._select_reports(reports),
                user_attrs={OF_RUN_ATTRIBUTE: run, "trial_id": record.trial_id, STATUS_ATTRIBUTE: str(record.status)},
                constraints={} if pruned else {HOPELESS_CONSTRAINT: float(hopeless)},
            )
        )

    def _select_reports(self, reports: Mapping[int, float | None]) -> dict[int, float]:
        """Return the finite reports; none for several objectives, where Optuna takes no intermediate values."""
        return {} if len(self._objectives) > 1 else {e: value for e, value in reports.items() if is_finite(value)}

    def _tell_values(self, trial: optuna.Trial, values: Sequence[float], *, hopeless: bool) -> None:
        with warnings.catch_warnings():
            # If the search was cut off between the two writes below, the constraint is there already.
            warnings.filterwarnings("ignore", "The constraint value is ignored")
            trial.set_constraint(HOPELESS_CONSTRAINT, float(hopeless))
            # CMA-ES does not need them: it ranks trials by value, and the worst value has the same effect.
            warnings.filterwarnings("ignore", "Constraints have been set, but CmaEsSampler will not use them")
            self.study.tell(trial, values)

    def _hopeless_values(self) -> list[float]:
        """Return the values of a hopeless trial: for GP, the worst of a completed trial so far for each objective.

        GPSampler fits the values themselves, in units of their standard deviation: beside one value of 1e9 all others
        are the same. So for GP only the constraint marks a trial as hopeless.
        """
        if not self._models_values:
            return [find_worst_value(name) for name in self._objectives]
        completed = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        measured = [trial.values for trial in completed if trial.constraints.get(HOPELESS_CONSTRAINT) == 0.0]
        if not measured:
            return [UNKNOWN_VALUES.get(name, 0.0) for name in self._metrics]
        columns = zip(self._objectives, zip(*measured, strict=True), strict=True)
        return [min(column) if is_maximized(name) else max(column) for name, column in columns]

    def _report(self, trial_id: str, value: float, epoch: int) -> None:
        """Report an epoch once: a retried trial repeats some, and Optuna keeps the first value."""
        # Optuna takes no intermediate values for several objectives: report raises.
        if len(self._objectives) == 1 and epoch > self._reported_epochs.get(trial_id, 0):
            self._reported_epochs[trial_id] = epoch
            self._trials[trial_id].report(value, epoch)


def _was_interrupted(stored: FrozenTrial, past: RecordedTrial) -> bool:
    """Return whether the study has a resumed trial as interrupted, or as out of memory for the deaths of its workers.

    The journal gets a trial's last report before the study does, but the meaning of a worker's death after it.
    """
    died = stored.user_attrs.get(STATUS_ATTRIBUTE) == TrialStatus.OUT_OF_MEMORY and past.unrecorded_end is None
    return stored.state is TrialState.FAIL or died


def _is_old_hopeless(old: OldTrial) -> bool:
    last = {} if old.record.last is None else vars(old.record.last)
    return old.record.status in HOPELESS_STATUSES or is_hopeless(last)


class NoLock(BaseJournalFileLock):
    """No lock, since a run's own journal has one already.

    Optuna's lock is a file beside the study, made and removed with each write. If it cannot be removed, because the
    folder is no longer writable, Optuna waits for it without end.
    """

    def acquire(self) -> bool:
        """Do nothing, and return success."""
        return True

    def release(self) -> None:
        """Do nothing."""


class WholeLines(JournalFileBackend):
    """Optuna's journal, in which a full disk leaves no half line behind: the next line would be joined to it."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append, or raise OSError and leave the file as it was."""
        size = Path(self._file_path).stat().st_size
        try:
            super().append_logs(logs)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._file_path, size)
            raise


def open_storage(path: Path) -> optuna.storages.JournalStorage:
    """Open the journal at ``path``, or create it."""
    return optuna.storages.JournalStorage(WholeLines(str(path), NoLock()))
