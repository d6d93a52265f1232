"""Defines the contents of a run's Parquet files, and writes and reads them.

A run's folder contains ``trials.parquet`` (one row a trial), ``epochs.parquet`` (one row a trial and epoch),
``best.parquet`` (the top k, ranked, with their results on fresh seeds) and ``confirm.parquet`` (one row a run on a
fresh seed). Column names, units and types are those of the dataclasses. Imports no torch, Ray or Optuna: a
configuration can be read wherever pyarrow is installed.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import math
import platform
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp import __version__
from tune_amp.results.confirmed import DEFAULT_ID, Confirmation, ConfirmedRun
from tune_amp.results.parquet import (
    build_columns,
    build_table,
    placed,
    read_file,
    read_origin,
    split_optional,
    write_parquet,
)
from tune_amp.results.run_folder import RunFolder, locate
from tune_amp.trial.config import (
    SAMPLERS,
    SCHEDULERS,
    SPREAD,
    EpochMetrics,
    InputError,
    OwnValue,
    TrialConfig,
    TrialStatus,
    checked_type,
    described,
    field_types,
    shown,
)
from tune_amp.trial.consent import distrust
from tune_amp.trial.objectives import read_objectives

_T = TypeVar("_T")

MOST_SECONDS = 1e12
"""Largest duration in a file, in seconds: far longer than a search, but still short to print."""
LARGEST_SHARE = 100.0
"""Largest share in a file: an accuracy is at most 1, but the interval of a mean over two seeds exceeds that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """An ended trial: one row of ``trials.parquet``, with its rows of ``epochs.parquet``.

    Raises:
        InputError: epochs do not increase, or ``started`` has no time zone.
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
    num_threads: int = described("CPU threads the trial computed with; a bit-identical replay needs as many")

    def __post_init__(self) -> None:
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
class Provenance:
    """The origin of a run's files, stored in each file's metadata as JSON. It has no host or user names.

    Raises:
        InputError: a field has another type than declared, or an objective is unknown.
    """

    run: str = described("name of the run")
    command: tuple[str, ...] = described("command line that started the search")
    created: str = described("when the run started: ISO 8601, UTC")
    space_source: str = described("where the search space was read from")
    space_text: str = described("the search space as used, YAML")
    dataset: str = described("data set of the run")
    data_hash: str = described("hash of the data set's content")
    train_images: int = described("images trained on", unit="images")
    validation_images: int = described("images that chose the best", unit="images")
    objective: str = described(
        "what was searched for: a metric, or several joined by commas; :max or :min where the name implies another"
    )
    sampler: str = described("which of Optuna's samplers suggested: " + ", ".join(SAMPLERS))
    scheduler: str = described("what stopped trials early: " + ", ".join(SCHEDULERS))
    seed: int = described("seed of the search")
    device: str = described("what the trials were given: cpu or cuda")
    versions: Mapping[str, str] = described("version of each library that matters, by name")
    warm_start: str | None = described("run, file and checksum that the search was warm-started from", default=None)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Objectives of the search; the first ranks the trials."""
        return tuple(self.objective.split(","))

    @property
    def data_dir(self) -> str | None:
        """The search's ``--data-dir``; None if it was not given."""
        for part, following in itertools.pairwise([*self.command, None]):
            if part == "--data-dir":
                return following
            if part is not None and part.startswith("--data-dir="):
                return part.removeprefix("--data-dir=")
        return None

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Provenance).items():
            if hint in (str, int, str | None):
                checked_type(name, getattr(self, name), hint)
        read_objectives("objective", self.objective, None)
        _check_texts("command", self.command, isinstance(self.command, list | tuple))
        _check_texts("versions", self.versions, isinstance(self.versions, Mapping))
        _check_texts("versions", self.versions.values(), True)
        object.__setattr__(self, "command", tuple(self.command))
        object.__setattr__(self, "versions", dict(self.versions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotTime:
    """The slot time of an ended search; slots are the places in which trials run at the same time.

    Raises:
        InputError: a field has another type, or is out of range.
    """

    slots: int
    wall_seconds: float
    """Seconds from the start of the command until the end of the last trial."""

    def __post_init__(self) -> None:
        if checked_type("slots", self.slots, int) < 1:
            raise InputError(f"slots: must be at least 1, got {shown(self.slots)}")
        if not 0 <= checked_type("wall_seconds", self.wall_seconds, float) <= MOST_SECONDS:
            raise InputError(f"wall_seconds: must be between 0 and {MOST_SECONDS:g}, got {shown(self.wall_seconds)}")


def list_reuse_words(
    train: Sequence[str], best: str, *, data_dir: str | None, own_code: Sequence[str] = ()
) -> list[str]:
    """Return the command that trains rank 1, with the same data, and with consent to the user's own code.

    Args:
        train: the command that trains, such as ``("tune-amp", "train")``.
        best: path of ``best.parquet``.
        data_dir: the search's ``--data-dir``; None if it was not given.
        own_code: flags that name the user's own code, from ``list_own_code``.
    """
    return [*train, best, *([] if data_dir is None else ["--data-dir", data_dir]), *own_code]


def list_versions(*packages: str) -> dict[str, str]:
    """Return the version of each installed package, and of Python."""
    return {name: find_version(name) for name in (*packages, "python")}


def find_version(package: str) -> str:
    """Return the version of a package or of ``python``, or ``not installed``."""
    if package == "python":
        return platform.python_version()
    if package == "tune_amp":  # on a cluster, the package is sent and not installed
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check_texts(name: str, value: Iterable[Any], is_container: bool) -> None:
    if not is_container or not all(isinstance(text, str) for text in value):
        raise InputError(f"{name}: must hold texts, got {shown(value)}")


# ---- schemas ----


def _build_trial_columns() -> list[pa.Field]:
    """Return TrialRecord's columns in order, with ``config`` and the last of ``epochs`` spread out in place."""
    spread = {"config": build_columns(TrialConfig), "epochs": build_columns(EpochMetrics, of_trials=True)}
    own = {column.name: [column] for column in build_columns(TrialRecord)}
    return [column for field in dataclasses.fields(TrialRecord) for column in (own | spread)[field.name]]


def _build_schemas() -> dict[str, pa.Schema]:
    trials = _build_trial_columns()
    about_rank = {"description": "place by the objective, from 1; null: a row to compare with"}
    columns = {
        "trials": trials,
        "epochs": [trials[0], *build_columns(EpochMetrics)],
        "best": [
            pa.field("rank", pa.int64(), metadata=about_rank),
            *trials,
            *(column.with_nullable(True) for column in build_columns(Confirmation)),
        ],
        "confirm": build_columns(ConfirmedRun),
    }
    for names in ([column.name for column in of_kind] for of_kind in columns.values()):
        assert len(names) == len(set(names)), "two dataclasses share a column name"
    return {kind: pa.schema(of_kind) for kind, of_kind in columns.items()}


SCHEMAS: Mapping[str, pa.Schema] = types.MappingProxyType(_build_schemas())


# ---- write ----


def write_trials(
    folder: Path, trials: Sequence[TrialRecord], provenance: Provenance, slot_time: SlotTime | None = None
) -> None:
    """Write ``trials.parquet`` and ``epochs.parquet`` into ``folder``, in the order given (that of submission).

    The slot time of an ended search is stored in the metadata of ``trials.parquet``.

    Raises:
        OSError: the folder is missing, or the disk is full; existing files are unchanged.
    """
    assert len({trial.trial_id for trial in trials}) == len(trials), "trial ids must be unique"
    epochs = [{"trial_id": trial.trial_id} | vars(epoch) for trial in trials for epoch in trial.epochs]
    # Epochs first: a crash between the two leaves no trial without its epochs.
    _write(folder, "epochs", epochs, provenance)
    _write(folder, "trials", [_to_row(t) for t in trials], provenance, slot_time)


def write_best(folder: Path, rows: Sequence[BestRow], provenance: Provenance) -> None:
    """Write ``best.parquet`` into ``folder``, in the order given.

    Raises:
        OSError: the folder is missing, or the disk is full; an existing file is unchanged.
    """
    assert any(row.rank is not None for row in rows), "a best file without a ranked trial is not written"
    written = [
        {"rank": row.rank} | _to_row(row.trial) | (vars(row.confirmation) if row.confirmation else {}) for row in rows
    ]
    _write(folder, "best", written, provenance)


def rank_trials(ranked: Sequence[TrialRecord]) -> list[BestRow]:
    """Return ``ranked`` as rows of ranks 1, 2, ..., not confirmed."""
    return [BestRow(rank=rank, trial=trial) for rank, trial in enumerate(ranked, start=1)]


def write_confirmed(folder: Path, runs: Sequence[ConfirmedRun], provenance: Provenance) -> None:
    """Write ``confirm.parquet`` into ``folder``, in the order given.

    Raises:
        OSError: the folder is missing, or the disk is full; an existing file is unchanged.
    """
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
    """Load the configuration of ``rank`` from ``best.parquet``; ``path`` is that file or its run's folder.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version, or has no such rank.
    """
    path = locate(path, "best")
    row = _pick_rank(path, {row["rank"]: row for row in read_file(path, "best", SCHEMAS["best"]).rows}, rank)
    with placed(path, row):
        return build_from(TrialConfig, row)


def load_best_rows(path: str | Path) -> list[BestRow]:
    """Load all rows of ``best.parquet``, each trial with its epochs if ``epochs.parquet`` exists, else its last.

    Raises:
        InputError: as for `load_best`.
    """
    return list(load_best_file(path).rows)


def load_best_file(path: str | Path, *, all_epochs: bool = True) -> BestFile:
    """Load ``best.parquet``; ``path`` is that file or its run's folder.

    Args:
        path: the file or the folder.
        all_epochs: False: only the last epoch of each trial is loaded, and ``epochs.parquet`` is not read.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version.
    """
    path = locate(path, "best")
    content = read_file(path, "best", SCHEMAS["best"])
    trials = [_to_record(path, row) for row in content.rows]
    beside = RunFolder(path.parent).epochs
    has_epochs = all_epochs and beside.exists()
    if has_epochs:
        trials = _add_epochs(path, trials, beside)
    rows = [_to_best_row(path, row, trial) for row, trial in zip(content.rows, trials, strict=True)]
    return BestFile(path=path, rows=rows, provenance=_to_provenance(path, content.origin), has_epochs=has_epochs)


def load_confirmed(path: str | Path) -> list[ConfirmedRun]:
    """Load the runs on fresh seeds; ``path`` is a run's folder, or its ``confirm.parquet``.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version.
    """
    path = locate(path, "confirm")
    runs = []
    for row in read_file(path, "confirm", SCHEMAS["confirm"]).rows:
        with placed(path, row):
            runs.append(build_from(ConfirmedRun, row | {"status": _read_status(row)}))
    return runs


def load_trials(path: str | Path) -> list[TrialRecord]:
    """Load all trials of a run in order of submission; ``path`` is its folder, or its ``trials.parquet``.

    Raises:
        InputError: a file is missing, damaged, not from tune_amp or of another version, or the two do not match.
    """
    return load_epochs(path, load_trials_file(path).trials)


def load_epochs(path: str | Path, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the ``trials`` of ``load_trials_file`` with all their epochs, from ``epochs.parquet``.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version, or it does not match.
    """
    path = locate(path, "trials")
    return _add_epochs(path, trials, locate(path.parent, "epochs"))


def load_trials_file(path: str | Path) -> TrialsFile:
    """Load ``trials.parquet``; ``path`` is that file or its run's folder.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version.
    """
    path = locate(path, "trials")
    content = read_file(path, "trials", SCHEMAS["trials"])
    trials = [_to_record(path, row) for row in content.rows]
    if len({trial.trial_id for trial in trials}) < len(trials):
        raise InputError(f"{path}: trial_id: must be unique")
    with placed(path):
        slot_time = None if content.slot_time is None else build_from(SlotTime, content.slot_time)
    return TrialsFile(trials=trials, provenance=_to_provenance(path, content.origin), slot_time=slot_time)


def load_provenance(path: str | Path) -> Provenance:
    """Load the origin of a run; ``path`` is any of its Parquet files or its folder.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp or of another version.
    """
    path = locate(path, "trials", "best", "epochs")
    return _to_provenance(path, read_origin(path))


def _pick_rank(path: Path, ranked: Mapping[int | None, _T], rank: int) -> _T:
    ranks = {*ranked} - {None}
    if rank not in ranks:
        raise InputError(f"{path}: rank: must be one of 1..{len(ranks)}, got {shown(rank)}")
    return ranked[rank]


def _to_provenance(path: Path, origin: Mapping[str, Any]) -> Provenance:
    with placed(path):
        return build_from(Provenance, origin)


def _add_epochs(path: Path, trials: Sequence[TrialRecord], epochs_path: Path) -> list[TrialRecord]:
    """Return the trials of the file ``path`` with all their epochs."""
    epochs: dict[str, list[EpochMetrics]] = {}
    for row in read_file(epochs_path, "epochs", SCHEMAS["epochs"]).rows:
        with placed(epochs_path, row):
            epochs.setdefault(row["trial_id"], []).append(build_from(EpochMetrics, row))
    completed = []
    for trial in trials:
        with placed(path, {"trial_id": trial.trial_id}):
            own = _select_epochs(trial, epochs.get(trial.trial_id, ()))
            completed.append(dataclasses.replace(trial, epochs=own))
    return completed


def _select_epochs(trial: TrialRecord, epochs: Sequence[EpochMetrics]) -> tuple[EpochMetrics, ...]:
    """Return a trial's epochs up to its last: after a crash, ``epochs.parquet`` may be one write ahead."""
    if trial.last is None:
        return ()
    last = trial.last.epoch
    own = tuple(epoch for epoch in epochs if epoch.epoch <= last)
    if not own or own[-1].epoch != last:
        raise InputError(f"epoch: epochs.parquet must hold epoch {last} of this trial: the files are of different runs")
    return own


def _to_record(path: Path, row: dict[str, Any]) -> TrialRecord:
    """Return the trial of a row, with its last epoch."""
    with placed(path, row):
        epochs = () if row["epoch"] is None else (build_from(EpochMetrics, row),)
        nested = {"config": build_from(TrialConfig, row), "epochs": epochs}
        return build_from(TrialRecord, row | nested | {"status": _read_status(row)})


def _to_best_row(path: Path, row: dict[str, Any], trial: TrialRecord) -> BestRow:
    with placed(path, row):
        confirmation = None if row["confirm_seeds"] is None else build_from(Confirmation, row)
    return BestRow(rank=row["rank"], trial=trial, confirmation=confirmation)


def _read_status(row: Mapping[str, Any]) -> TrialStatus:
    if row["status"] not in list(TrialStatus):
        raise InputError(f"status: must be one of {', '.join(TrialStatus)}, got {shown(row['status'])}")
    return TrialStatus(row["status"])


def build_from(source: type[_T], values: Mapping[str, Any]) -> _T:
    """Build a ``source`` from those ``values`` that are its fields; lists become tuples.

    Raises:
        InputError: a field is absent, or null where it cannot be, or breaks a rule of ``source``.
    """
    arguments: dict[str, Any] = {name: _check_own(values[name]) for name in _SPREAD_OF[source] if name in values}
    for name, (optional, has_default) in _FIELD_RULES[source].items():
        if name not in values and has_default:
            continue
        value = values.get(name)
        if value is None and not optional:
            raise InputError(f"{name}: must be there, got null")
        if name in _TIMES and isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}: must be a finite number, got {value}")  # a loss may be NaN, a time cannot
        if isinstance(value, float) and abs(value) > _LIMITS.get(name, math.inf):
            raise InputError(f"{name}: must be at most {_LIMITS[name]:g}, got {value:g}")
        if isinstance(value, str):
            distrust(value)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return source(**arguments)


def _list_field_rules(source: type) -> dict[str, tuple[bool, bool]]:
    """Return for each field whether it may be None, and whether it has a default."""
    hints = field_types(source)
    defaults = {field.name: field.default is not dataclasses.MISSING for field in dataclasses.fields(source)}
    return {name: (split_optional(hint)[1], defaults[name]) for name, hint in hints.items()}


def _check_own(values: Any) -> dict[str, Any]:
    """Return a mapping from names to numbers or texts, as a file holds it."""
    if not isinstance(values, Mapping):
        raise InputError(f"own values: must be a mapping, got {shown(values)}")
    for name, value in values.items():
        if isinstance(value, str):
            distrust(value)
        elif not isinstance(value, float):  # a measured value may be NaN
            checked_type(name, value, OwnValue)
    return dict(values)


_TIMES = {
    field.name
    for source in (EpochMetrics, TrialRecord, ConfirmedRun)
    for field in dataclasses.fields(source)
    if field.metadata.get("unit") in ("s", "1/s")
}

_LIMITS = dict.fromkeys((*_TIMES, "optimism"), MOST_SECONDS) | {
    field.name: LARGEST_SHARE
    for source in (EpochMetrics, Confirmation, ConfirmedRun)
    for field in dataclasses.fields(source)
    if "accuracy" in field.name or field.name == "underflow_share"
}

# Listed once: resolving the annotations costs more than building a row.
_FIELD_RULES: Mapping[type, Mapping[str, tuple[bool, bool]]] = {
    source: _list_field_rules(source)
    for source in (TrialConfig, EpochMetrics, TrialRecord, Confirmation, ConfirmedRun, Provenance, SlotTime)
}
_SPREAD_OF: Mapping[type, list[str]] = {
    source: [field.name for field in dataclasses.fields(source) if field.name in SPREAD] for source in _FIELD_RULES
}
