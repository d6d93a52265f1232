"""Defines the contents of a run's Parquet files, and writes and reads them.

A run's folder contains ``trials.parquet`` (one row a trial), ``epochs.parquet`` (one row a trial and epoch),
``best.parquet`` (the top k, ranked, with their results on fresh seeds) and ``confirm.parquet`` (one row a run on a
fresh seed). Column names, units and types are those of the dataclasses. Imports no torch, Ray or Optuna: a
configuration can be read wherever pyarrow is installed.

Every ``load_`` function raises InputError if a file is missing, damaged, not from tune_amp or of another version, or
has no such rank; every ``write_`` function raises OSError if the folder is missing or the disk is full, and leaves
existing files unchanged.
"""

import dataclasses
import datetime
import itertools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp.results.confirmed import DEFAULT_ID, Confirmation, ConfirmedRun
from tune_amp.results.parquet import build_columns, build_table, placed, read_file, read_origin, write_parquet
from tune_amp.results.provenance import Provenance
from tune_amp.results.rows import MOST_SECONDS, build_from
from tune_amp.results.run_folder import RunFolder, locate
from tune_amp.trial.config import (
    EpochMetrics,
    InputError,
    Rule,
    TrialConfig,
    TrialStatus,
    at_least,
    check,
    check_fields,
    described,
)
from tune_amp.trial.text import shown

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """An ended trial: one row of ``trials.parquet``, with its rows of ``epochs.parquet``.

    Raises:
        InputError: epochs do not increase, ``num_threads`` is negative, or ``started`` has no time zone.
    """

    trial_id: str = described("Ray Tune's id of the trial; always a text, also where it looks like a number")
    status: TrialStatus = described("how the trial ended: " + ", ".join(TrialStatus))  # noqa: RUF009 (a field)
    config: TrialConfig
    epochs: tuple[EpochMetrics, ...]
    trial_name: str = described("Ray Tune's name of the trial")
    error: str | None = described("one line: why the trial diverged or failed", default=None)
    config_fault: bool = described(
        "whether a failure is the settings' fault: refused by a check, or the same error twice", default=False
    )
    inert: tuple[str, ...] = described("settings that cannot act in this trial, even at its full budget", default=())
    started: datetime.datetime | None = described("when the trial started, UTC", default=None)  # noqa: RUF009 (a field)
    wall_seconds: float = described("time from the trial's start to its end", unit="s")
    setup_seconds: float = described("time making the trial's model and optimizer", unit="s", default=0.0)
    checkpoint_seconds: float = described(
        "time writing the trial's checkpoints, up to its last report", unit="s", default=0.0
    )
    worker: int | None = described(
        "number of the worker process that trained the trial (the last, where one died), from 1; null: none reported",
        default=None,
    )
    device: str = described("device the trial computed on: cpu, or the GPU's name")
    num_threads: int = described(
        "CPU threads the trial computed with, 0 if it never began; a bit-identical replay needs as many"
    )

    def __post_init__(self) -> None:
        check("num_threads", self.num_threads, self.num_threads >= 0, "must be at least 0")
        for earlier, later in itertools.pairwise(self.epochs):
            if later.epoch <= earlier.epoch:
                raise InputError(f"epochs: must increase, got {later.epoch} after {earlier.epoch}")
        if self.error is not None:
            # An exception's text may span lines or hold surrogates (file names do), which Arrow cannot encode.
            text = self.error.encode(errors="replace").decode()
            object.__setattr__(self, "error", " ".join(text.split()))
        if self.started is not None:
            if self.started.tzinfo is None:
                raise InputError(f"started: must carry a time zone, got {self.started.isoformat()}")
            object.__setattr__(self, "started", self.started.astimezone(datetime.UTC))

    @property
    def last(self) -> EpochMetrics | None:
        """The last report, or None if the trial never reported."""
        return self.epochs[-1] if self.epochs else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestRow:
    """A row of ``best.parquet``."""

    rank: int | None
    """Place from 1; None for a row to compare with, which is the tutorial's default configuration."""
    trial: TrialRecord
    confirmation: Confirmation | None = None
    """Results on fresh seeds; None if the search was not confirmed."""

    @property
    def is_default(self) -> bool:
        """Whether this is the tutorial's default configuration, which was no trial."""
        return self.trial.trial_id == DEFAULT_ID

    @property
    def may_be_best(self) -> bool | None:
        """Whether it may be the truly best one; None if it was not confirmed, or if a run did not complete."""
        return self.confirmation.tied_with_best if self.confirmation else None

    @property
    def name(self) -> str:
        """``rank 1``, ``rank 1 (default)`` or ``default``."""
        if self.rank is None:
            return DEFAULT_ID
        return f"rank {self.rank}{f' ({DEFAULT_ID})' if self.is_default else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotTime:
    """The slot time of an ended search; slots are the places in which trials run at the same time.

    Raises:
        InputError: a field has another type, or is out of range.
    """

    slots: int = described("trials at the same time", rule=at_least(1))
    wall_seconds: float = described(
        "time from the start of the command until the end of the last trial",
        rule=Rule(f"must be between 0 and {MOST_SECONDS:g}", lambda seconds: 0 <= seconds <= MOST_SECONDS),
        unit="s",
    )

    def __post_init__(self) -> None:
        check_fields(self)


# ---- schemas ----


def _build_schemas() -> dict[str, pa.Schema]:
    # TrialRecord's columns in order, with ``config`` and the last of ``epochs`` spread out in place.
    parts = {column.name: [column] for column in build_columns(TrialRecord)}
    parts |= {"config": build_columns(TrialConfig), "epochs": build_columns(EpochMetrics, of_trials=True)}
    trials = [column for field in dataclasses.fields(TrialRecord) for column in parts[field.name]]
    about_rank = {"description": "place by the objective, from 1; null: a row to compare with"}
    fresh = [column.with_nullable(True) for column in build_columns(Confirmation)]
    columns = {
        "trials": trials,
        "epochs": [trials[0], *build_columns(EpochMetrics)],
        "best": [pa.field("rank", pa.int64(), metadata=about_rank), *trials, *fresh],
        "confirm": build_columns(ConfirmedRun),
    }
    for of_kind in columns.values():
        assert len({column.name for column in of_kind}) == len(of_kind), "two dataclasses share a column name"
    return {kind: pa.schema(of_kind) for kind, of_kind in columns.items()}


SCHEMAS: Mapping[str, pa.Schema] = types.MappingProxyType(_build_schemas())


# ---- write ----


def write_trials(
    folder: Path, trials: Sequence[TrialRecord], provenance: Provenance, slot_time: SlotTime | None = None
) -> None:
    """Write ``trials.parquet`` and ``epochs.parquet`` into ``folder``, in the order given (that of submission).

    The slot time of an ended search is stored in the metadata of ``trials.parquet``.
    """
    assert len({trial.trial_id for trial in trials}) == len(trials), "trial ids must be unique"
    epochs = [{"trial_id": trial.trial_id} | vars(epoch) for trial in trials for epoch in trial.epochs]
    # Epochs first: a crash between the two leaves no trial without its epochs.
    _write(folder, "epochs", epochs, provenance)
    _write(folder, "trials", [_to_row(t) for t in trials], provenance, slot_time)


def write_best(folder: Path, rows: Sequence[BestRow], provenance: Provenance) -> None:
    """Write ``best.parquet`` into ``folder``, in the order given."""
    assert any(row.rank is not None for row in rows), "a best file without a ranked trial is not written"
    written = [
        {"rank": row.rank} | _to_row(row.trial) | (vars(row.confirmation) if row.confirmation else {}) for row in rows
    ]
    _write(folder, "best", written, provenance)


def rank_trials(ranked: Sequence[TrialRecord]) -> list[BestRow]:
    """Return ``ranked`` as rows of ranks 1, 2, ..., not confirmed."""
    return [BestRow(rank=rank, trial=trial) for rank, trial in enumerate(ranked, start=1)]


def write_confirmed(folder: Path, runs: Sequence[ConfirmedRun], provenance: Provenance) -> None:
    """Write ``confirm.parquet`` into ``folder``, in the order given."""
    _write(folder, "confirm", [vars(run).copy() for run in runs], provenance)


def _write(
    folder: Path, kind: str, rows: list[dict[str, Any]], provenance: Provenance, slot_time: SlotTime | None = None
) -> None:
    spent = None if slot_time is None else dataclasses.asdict(slot_time)
    table = build_table(kind, SCHEMAS[kind], rows, dataclasses.asdict(provenance), spent)
    write_parquet(table, RunFolder(folder).table(kind))


def _to_row(trial: TrialRecord) -> dict[str, Any]:
    return vars(trial) | vars(trial.config) | (vars(trial.last) if trial.last else {})


# ---- read ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFile:
    """The content of ``best.parquet``."""

    path: Path
    rows: Sequence[BestRow]
    provenance: Provenance
    has_epochs: bool
    """Whether the trials have all their epochs, from ``epochs.parquet``, and not just the last."""

    @property
    def ranked(self) -> list[BestRow]:
        """The rows with a rank; the default has none in a search with several objectives."""
        return [row for row in self.rows if row.rank is not None]

    def pick(self, rank: int) -> BestRow:
        """Return the row of ``rank``.

        Raises:
            InputError: there is no such rank.
        """
        return _pick_rank(self.path, {row.rank: row for row in self.rows}, rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialsFile:
    """The content of ``trials.parquet``."""

    trials: list[TrialRecord]
    """In order of submission, each with its last epoch only."""
    provenance: Provenance
    slot_time: SlotTime | None
    """None if the run was killed or is still running: the slot time is written when a search ends."""


def load_best(path: str | Path, rank: int = 1) -> TrialConfig:
    """Load the configuration of ``rank`` from ``best.parquet``; ``path`` is that file or its run's folder."""
    path = locate(path, "best")
    row = _pick_rank(path, {row["rank"]: row for row in read_file(path, "best", SCHEMAS["best"]).rows}, rank)
    with placed(path, row):
        return build_from(TrialConfig, row)


def load_best_rows(path: str | Path) -> list[BestRow]:
    """Load all rows of ``best.parquet``, each trial with its epochs if ``epochs.parquet`` exists, else its last."""
    return list(load_best_file(path).rows)


def load_best_file(path: str | Path, *, all_epochs: bool = True) -> BestFile:
    """Load ``best.parquet``; ``path`` is that file or its run's folder.

    Args:
        path: the file or the folder.
        all_epochs: False: only the last epoch of each trial is loaded, and ``epochs.parquet`` is not read.
    """
    path = locate(path, "best")
    content = read_file(path, "best", SCHEMAS["best"])
    trials = [_to_record(path, row) for row in content.rows]
    has_epochs = all_epochs and RunFolder(path.parent).epochs.exists()
    if has_epochs:
        trials = load_epochs(path, trials)
    rows = []
    for row, trial in zip(content.rows, trials, strict=True):
        with placed(path, row):
            confirmation = None if row["confirm_seeds"] is None else build_from(Confirmation, row)
        rows.append(BestRow(rank=row["rank"], trial=trial, confirmation=confirmation))
    return BestFile(path=path, rows=rows, provenance=_to_provenance(path, content.origin), has_epochs=has_epochs)


def load_confirmed(path: str | Path) -> list[ConfirmedRun]:
    """Load the runs on fresh seeds; ``path`` is a run's folder, or its ``confirm.parquet``."""
    path = locate(path, "confirm")
    runs = []
    for row in read_file(path, "confirm", SCHEMAS["confirm"]).rows:
        with placed(path, row):
            runs.append(build_from(ConfirmedRun, row))
    return runs


def load_trials(path: str | Path) -> list[TrialRecord]:
    """Load all trials of a run in order of submission; ``path`` is its folder, or its ``trials.parquet``.

    Raises:
        InputError: as for all loaders, or ``epochs.parquet`` does not match.
    """
    return load_epochs(path, load_trials_file(path).trials)


def load_trials_file(path: str | Path) -> TrialsFile:
    """Load ``trials.parquet``; ``path`` is that file or its run's folder."""
    path = locate(path, "trials")
    content = read_file(path, "trials", SCHEMAS["trials"])
    trials = [_to_record(path, row) for row in content.rows]
    if len({trial.trial_id for trial in trials}) < len(trials):
        raise InputError(f"{path}: trial_id: must be unique")
    with placed(path):
        slot_time = None if content.slot_time is None else build_from(SlotTime, content.slot_time)
    return TrialsFile(trials=trials, provenance=_to_provenance(path, content.origin), slot_time=slot_time)


def load_epochs(path: str | Path, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the ``trials`` of ``path``, a file or its run's folder, with all their epochs, from ``epochs.parquet``.

    Raises:
        InputError: as for all loaders, or ``epochs.parquet`` does not match.
    """
    path = locate(path, "trials")
    beside = locate(path.parent, "epochs")
    epochs: dict[str, list[EpochMetrics]] = {}
    for row in read_file(beside, "epochs", SCHEMAS["epochs"]).rows:
        with placed(beside, row):
            epochs.setdefault(row["trial_id"], []).append(build_from(EpochMetrics, row))
    completed = []
    for trial in trials:
        with placed(path, {"trial_id": trial.trial_id}):
            # After a crash, epochs.parquet may be one write ahead.
            last = trial.last.epoch if trial.last else None
            own = [epoch for epoch in epochs.get(trial.trial_id, ()) if last is not None and epoch.epoch <= last]
            if last is not None and (not own or own[-1].epoch != last):
                rule = f"epochs.parquet must hold epoch {last} of this trial"
                raise InputError(f"epoch: {rule}: the files are of different runs")
            completed.append(dataclasses.replace(trial, epochs=tuple(own)))
    return completed


def load_provenance(path: str | Path) -> Provenance:
    """Load the origin of a run; ``path`` is any of its Parquet files or its folder."""
    path = locate(path, "trials", "best", "epochs")
    return _to_provenance(path, read_origin(path)[1])


def _pick_rank(path: Path, ranked: Mapping[int | None, _T], rank: int) -> _T:
    ranks = {*ranked} - {None}
    if rank not in ranks:
        raise InputError(f"{path}: rank: must be one of 1..{len(ranks)}, got {shown(rank)}")
    return ranked[rank]


def _to_provenance(path: Path, origin: Mapping[str, Any]) -> Provenance:
    with placed(path):
        return build_from(Provenance, origin)


def _to_record(path: Path, row: dict[str, Any]) -> TrialRecord:
    """Return the trial of a row, with its last epoch."""
    with placed(path, row):
        epochs = () if row["epoch"] is None else (build_from(EpochMetrics, row),)
        return build_from(TrialRecord, row | {"config": build_from(TrialConfig, row), "epochs": epochs})
