"""The data of a report: a run as read from its Parquet files, with a reason for each missing part."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.importance import ImportanceResult, load_importance
from tune_amp.results.ranking import choose_best
from tune_amp.results.records import (
    BestRow,
    Provenance,
    SlotTime,
    TrialRecord,
    load_best_rows,
    load_confirmed,
    load_provenance,
    load_slot_time,
    load_trials,
    rank_trials,
)
from tune_amp.results.run_files import BEST_FILE, CONFIRM_FILE, EPOCHS_FILE, IMPORTANCE_FILE, TRIALS_FILE
from tune_amp.space.parameter import Parameter
from tune_amp.space.space import SEARCHABLE, parse_space
from tune_amp.trial.config import InputError, TrialConfig, read_setting

_T = TypeVar("_T")

MISSING = "is missing"

# How many trials are ranked here, since a killed run has no best.parquet: as many as a search ranks by default.
TOP_K = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run folder."""

    folder: Path
    provenance: Provenance
    trials: tuple[TrialRecord, ...]
    """In order of submission."""
    rows: tuple[BestRow, ...]
    """Rows of ``best.parquet``, or ranked here if it cannot be read."""
    importance: ImportanceResult | None
    confirmed: tuple[ConfirmedRun, ...]
    slot_time: SlotTime | None
    parameters: tuple[Parameter, ...]
    """Searched parameters."""
    troubles: Mapping[str, str]
    """File -> why its part is missing: ``is missing``, or the error message of reading it."""

    @property
    def objective(self) -> str:
        """The first objective, by which trials are ranked."""
        return self.provenance.objectives[0]

    @functools.cached_property
    def ranked(self) -> tuple[BestRow, ...]:
        """The rows with a rank, best first; including the default if it competed."""
        ranked = [(row.rank, row) for row in self.rows if row.rank is not None]
        return tuple(row for _, row in sorted(ranked, key=lambda pair: pair[0]))

    @property
    def winner(self) -> BestRow | None:
        """Rank 1; None if no trial produced a result."""
        return self.ranked[0] if self.ranked else None

    @property
    def default(self) -> BestRow | None:
        """The tutorial's configuration; None unless it was confirmed beside the winners."""
        return next((row for row in self.rows if row.is_default), None)

    @property
    def listed(self) -> tuple[BestRow, ...]:
        """The ranked rows, and the default if it has no rank."""
        return self.ranked if self.default is None or self.default.rank else (*self.ranked, self.default)

    @property
    def is_confirmed(self) -> bool:
        """Whether the winner was confirmed on fresh seeds."""
        return self.winner is not None and self.winner.confirmation is not None

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
        steps = self.provenance.train_images // config.batch_size * config.max_epochs
        return parameter.find_nearest(value, trial_steps=steps).get(parameter.optuna_name)


def load_run(folder: Path) -> Run:
    """Read a run's files. Only ``trials.parquet`` is required.

    Raises:
        InputError: ``trials.parquet`` is missing, damaged, not written by tune_amp or of another version.
    """
    if folder.is_file():
        folder = folder.parent
    troubles: dict[str, str] = {}
    few = load_trials(folder, all_epochs=False)
    trials = _attempt(troubles, folder, EPOCHS_FILE, lambda: load_trials(folder)) or few
    provenance = load_provenance(folder / TRIALS_FILE)
    rows = _attempt(troubles, folder, BEST_FILE, lambda: load_best_rows(folder, all_epochs=False))
    if rows is None:
        rows = rank_trials(choose_best(trials, provenance.objectives, TOP_K))
    return Run(
        folder=folder,
        provenance=provenance,
        trials=tuple(trials),
        rows=tuple(rows),
        importance=_attempt(troubles, folder, IMPORTANCE_FILE, lambda: load_importance(folder)),
        confirmed=tuple(_attempt(troubles, folder, CONFIRM_FILE, lambda: load_confirmed(folder)) or ()),
        slot_time=_attempt(troubles, folder, TRIALS_FILE, lambda: load_slot_time(folder)),
        parameters=_find_parameters(provenance, trials),
        troubles=troubles,
    )


def _attempt(troubles: dict[str, str], folder: Path, name: str, load: Callable[[], _T]) -> _T | None:
    """Return the result of ``load``; on failure return None and record the reason under ``name`` in ``troubles``."""
    if not (folder / name).is_file():
        troubles[name] = MISSING
        return None
    try:
        return load()
    except InputError as error:
        troubles[name] = str(error)
        return None


def _find_parameters(provenance: Provenance, trials: list[TrialRecord]) -> tuple[Parameter, ...]:
    """Return the space's parameters; if its text is of another version, the settings that differ among the trials."""
    try:
        return parse_space(provenance.space_source, provenance.space_text).parameters
    except InputError:
        values = {name: {getattr(trial.config, name) for trial in trials} - {None} for name in SEARCHABLE}
        return tuple(
            Parameter(name=name, choices=tuple(sorted(found))) for name, found in values.items() if len(found) > 1
        )


def find_value(trial: TrialRecord, objective: str) -> float | None:
    """Return the last value of an objective; None if there is none, or if it is not finite."""
    value: float | None = getattr(trial.last, objective, None)
    return value if value is not None and math.isfinite(value) else None


def list_rankable(run: Run) -> list[TrialRecord]:
    """Return the trials that the ranking by the first objective considers, in order of submission."""
    ranked = choose_best(run.trials, (run.objective,), len(run.trials)) if run.trials else []
    ids = {trial.trial_id for trial in ranked}
    return [trial for trial in run.trials if trial.trial_id in ids]
