"""The data of a report: a run as read from its Parquet files, with a reason for each missing part."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.importance import ImportanceResult, load_importance
from tune_amp.results.provenance import Provenance
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import (
    BestRow,
    SlotTime,
    TrialRecord,
    load_best_file,
    load_confirmed,
    load_epochs,
    load_trials_file,
    rank_trials,
)
from tune_amp.results.run_folder import RunFolder
from tune_amp.results.statistics import mean_interval
from tune_amp.space.document import SEARCHABLE
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import parse_space
from tune_amp.trial.config import (
    OWN,
    RANKING_OBJECTIVES,
    InputError,
    TrialConfig,
    is_finite,
    read_setting,
)
from tune_amp.trial.objectives import metric_of

_T = TypeVar("_T")

MISSING = "is missing"

# How many trials are ranked here, since a killed run has no best.parquet: as many as a search ranks by default.
TOP_K = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run folder."""

    folder: RunFolder
    provenance: Provenance
    trials: tuple[TrialRecord, ...]
    """In order of submission."""
    rows: tuple[BestRow, ...]
    """Rows of ``best.parquet``, or ranked here if it cannot be read: those with a rank, best first, then the default if
    it has none."""
    importance: ImportanceResult | None
    confirmed: tuple[ConfirmedRun, ...]
    slot_time: SlotTime | None
    parameters: tuple[Parameter, ...]
    """Searched parameters."""
    troubles: Mapping[Path, str]
    """File -> why its part is missing: ``is missing``, or the error message of reading it."""

    @property
    def objective(self) -> str:
        """The first objective, by which trials are ranked."""
        return self.provenance.objectives[0]

    @property
    def ranked(self) -> tuple[BestRow, ...]:
        """The rows with a rank, best first; including the default if it competed."""
        return tuple(row for row in self.rows if row.rank is not None)

    @property
    def winner(self) -> BestRow | None:
        """Rank 1; None if no trial produced a result."""
        return next(iter(self.ranked), None)

    @property
    def default(self) -> BestRow | None:
        """The tutorial's configuration; None unless it was confirmed beside the winners."""
        return next((row for row in self.rows if row.is_default), None)

    def is_winner(self, trial: TrialRecord) -> bool:
        """Return whether ``trial`` is rank 1."""
        return self.winner is not None and trial.trial_id == self.winner.trial.trial_id

    def find_setting(self, parameter: Parameter, config: TrialConfig) -> Any:
        """Return a setting as it was searched: relative to the trial if the space says so; None if it is not active.

        An interval is rounded to whole steps, so division recovers its fraction only approximately. For a choice, the
        nearest one is returned.
        """
        value = read_setting(config, parameter.name)
        if value is None or not parameter.fraction_of_trial:
            return value
        # Steps as the space counts them: it counts a curriculum's shorter epochs as full ones.
        steps = config.count_full_steps(self.provenance.train_images)
        return parameter.find_nearest(value, trial_steps=steps).get(parameter.optuna_name)


def load_run(path: Path) -> Run:
    """Read the files of the run in the folder ``path``, or of the file ``path``. Only ``trials.parquet`` is required.

    Raises:
        InputError: ``trials.parquet`` is missing, damaged, not written by tune_amp or of another version.
    """
    folder = RunFolder(path.parent if path.is_file() else path)
    troubles: dict[Path, str] = {}
    ended = load_trials_file(folder.path)
    provenance = ended.provenance
    trials = _attempt(troubles, folder.epochs, lambda path: load_epochs(path.parent, ended.trials)) or ended.trials
    best = _attempt(troubles, folder.best, lambda path: load_best_file(path, all_epochs=False))
    rows = best.rows if best else rank_trials(choose_best(trials, provenance.objectives, TOP_K))
    return Run(
        folder=folder,
        provenance=provenance,
        trials=tuple(trials),
        rows=tuple(sorted(rows, key=lambda row: math.inf if row.rank is None else row.rank)),
        importance=_attempt(troubles, folder.importance, load_importance),
        confirmed=tuple(_attempt(troubles, folder.confirm, load_confirmed) or ()),
        slot_time=ended.slot_time,
        parameters=_find_parameters(provenance, trials),
        troubles=troubles,
    )


def _attempt(troubles: dict[Path, str], path: Path, load: Callable[[Path], _T]) -> _T | None:
    """Return what ``load`` reads from ``path``; on failure return None and record the reason in ``troubles``."""
    if not path.is_file():
        troubles[path] = MISSING
        return None
    try:
        return load(path)
    except InputError as error:
        troubles[path] = str(error)
        return None


def _find_parameters(provenance: Provenance, trials: list[TrialRecord]) -> tuple[Parameter, ...]:
    """Return the space's parameters; if its text is of another version, the settings that differ among the trials."""
    try:
        return parse_space(provenance.space_source, provenance.space_text).parameters
    except InputError:
        own = dict.fromkeys(f"{OWN}{name}" for trial in trials for name in trial.config.own)
        values = {name: {read_setting(trial.config, name) for trial in trials} - {None} for name in (*SEARCHABLE, *own)}
        return tuple(
            Parameter(name=name, choices=tuple(sorted(found, key=lambda value: (isinstance(value, str), value))))
            for name, found in values.items()
            if len(found) > 1
        )


def find_value(trial: TrialRecord, objective: str) -> float | None:
    """Return the last value of an objective; None if there is none, or if it is not finite."""
    value = trial.last.find_value(objective) if trial.last else None
    return value if is_finite(value) else None


def list_metrics(run: Run) -> list[str]:
    """Return the objectives, then accuracy and loss, of those that any trial measured."""
    names = dict.fromkeys(metric_of(name) for name in (*run.provenance.objectives, *RANKING_OBJECTIVES))
    lasts = [trial.last for trial in run.trials if trial.last]
    return [name for name in names if any(last.find_value(name) is not None for last in lasts)]


def list_pair(run: Run) -> list[str]:
    """Return the first objective's counterpart on the test set, if it was measured, and the first objective."""
    name = metric_of(run.objective)
    tested = name.replace("val_", "test_", 1) if name.startswith("val_") else None
    is_measured = tested and (
        any(one.find_value(tested) is not None for one in run.confirmed)
        or any(find_interval(run, row, tested) for row in run.rows)
    )
    return [tested, name] if tested and is_measured else [name]


def find_interval(run: Run, row: BestRow, metric: str) -> tuple[float, float, float] | None:
    """Return the mean of a metric over the fresh seeds and the ends of its 95% interval; None if it has none."""
    found = row.confirmation
    if found is None or found.confirm_failures:
        return None
    mean, low, high = (found.find_part(metric, part) for part in ("mean", "low", "high"))
    if mean is not None and low is not None and high is not None:
        return mean, low, high
    values = [one.find_value(metric) for one in run.confirmed if one.trial_id == row.trial.trial_id]
    known = [value for value in values if is_finite(value)]
    if len(known) < max(2, len(values)):
        return None
    interval = mean_interval(known)
    return interval.mean, interval.low, interval.high


def list_rankable(run: Run) -> list[TrialRecord]:
    """Return the trials that the ranking by the first objective considers, in order of submission."""
    ranked = choose_best(run.trials, (run.objective,), len(run.trials)) if run.trials else []
    ids = {trial.trial_id for trial in ranked}
    return [trial for trial in run.trials if trial.trial_id in ids]
