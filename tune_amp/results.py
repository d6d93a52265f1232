"""The Parquet contract: write, read, choose and replay.

A run's folder holds ``trials.parquet`` (one row a trial), ``epochs.parquet`` (one row a trial and epoch) and
``best.parquet`` (the top k, ranked). Column names, units and types are those of the dataclasses. Imports no torch, Ray
or Optuna: a configuration can be read wherever pyarrow is. Nothing that is read is unpickled or evaluated.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import types
import typing
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tune_amp.config import (
    OBJECTIVES,
    EpochMetrics,
    InputError,
    TrialConfig,
    TrialStatus,
    checked_type,
    described,
    shown,
)

SCHEMA_VERSION = 1
METADATA_KEY = "tune_amp"

_T = TypeVar("_T")

# A file that claims more is damaged or hostile: refused before anything of that size is allocated.
MOST_COLUMNS = 1_000
MOST_ROWS = 10_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as it ended: one row of ``trials.parquet``, with its rows of ``epochs.parquet``.

    Raises:
        InputError: epochs do not increase, or ``started`` has no time zone.
    """

    trial_id: str = described("Ray Tune's id of the trial; always a text, also where it looks like a number")
    status: TrialStatus = described("how the trial ended: " + ", ".join(TrialStatus))  # noqa: RUF009 (a field)
    config: TrialConfig
    epochs: tuple[EpochMetrics, ...]
    trial_name: str = described("Ray Tune's name of the trial")
    error: str | None = described("one line: why the trial diverged or failed", default=None)
    started: datetime.datetime | None = described("when the trial started, UTC", default=None)  # noqa: RUF009 (a field)
    wall_seconds: float = described("time from the trial's start to its end", unit="s")
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
        """The last report, or None where the trial never reported."""
        return self.epochs[-1] if self.epochs else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a run's files come from; travels in each file's metadata, as JSON. No host or user names.

    Raises:
        InputError: a field has another type than declared.
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
    objective: str = described("what the trials are ranked by: " + " or ".join(OBJECTIVES))
    seed: int = described("seed of the search")
    device: str = described("what the trials were given: cpu or cuda")
    versions: Mapping[str, str] = described("version of each library that matters, by name")

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Provenance).items():
            if hint in (str, int):
                checked_type(name, getattr(self, name), hint)
        _check_texts("command", self.command, isinstance(self.command, list | tuple))
        _check_texts("versions", self.versions, isinstance(self.versions, Mapping))
        _check_texts("versions", self.versions.values(), True)
        object.__setattr__(self, "command", tuple(self.command))
        object.__setattr__(self, "versions", dict(self.versions))


def _check_texts(name: str, value: Iterable[Any], is_container: bool) -> None:
    if not is_container or not all(isinstance(text, str) for text in value):
        raise InputError(f"{name}: must hold texts, got {shown(value)}")


# ---- schemas ----

_ARROW_TYPES: Mapping[Any, pa.DataType] = {
    float: pa.float64(),
    int: pa.int64(),
    str: pa.string(),
    TrialStatus: pa.string(),
    datetime.datetime: pa.timestamp("us", tz="UTC"),
    tuple[int, ...]: pa.list_(pa.field("element", pa.int64(), nullable=False)),
    tuple[float, ...]: pa.list_(pa.field("element", pa.float64(), nullable=False)),
}


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """A field's type without ``None``, and whether ``None`` was part of it."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    [plain] = set(typing.get_args(hint)) - {types.NoneType}
    return plain, True


def _build_column(field: dataclasses.Field[Any], hint: Any, *, nullable: bool) -> pa.Field:
    plain, optional = _split_optional(hint)
    unit, description = field.metadata["unit"], field.metadata["doc"]
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(field.name, _ARROW_TYPES[plain], nullable=optional or nullable, metadata=metadata)


def _build_trial_columns() -> list[pa.Field]:
    """TrialRecord's columns in its own order, ``config`` and ``epochs`` (their last) spread out in place."""
    spread = {"config": _build_columns(TrialConfig), "epochs": _build_columns(EpochMetrics, of_trials=True)}
    own = {column.name: [column] for column in _build_columns(TrialRecord)}
    return [column for field in dataclasses.fields(TrialRecord) for column in (own | spread)[field.name]]


def _build_columns(source: type, *, of_trials: bool = False) -> list[pa.Field]:
    """A column for each described field; ``of_trials``: nullable, as a trial may end before its first report."""
    hints = typing.get_type_hints(source)
    return [
        _build_column(field, hints[field.name], nullable=of_trials)
        for field in dataclasses.fields(source)
        if field.metadata and not (of_trials and field.metadata["epoch_only"])
    ]


def _build_schemas() -> dict[str, pa.Schema]:
    trials = _build_trial_columns()
    about_rank = {"description": "place by the objective, from 1; null: a row to compare with"}
    columns = {
        "trials": trials,
        "epochs": [trials[0], *_build_columns(EpochMetrics)],
        "best": [pa.field("rank", pa.int64(), metadata=about_rank), *trials],
    }
    for names in ([column.name for column in of_kind] for of_kind in columns.values()):
        assert len(names) == len(set(names)), "two dataclasses share a column name"
    return {kind: pa.schema(of_kind) for kind, of_kind in columns.items()}


SCHEMAS: Mapping[str, pa.Schema] = types.MappingProxyType(_build_schemas())


# ---- write ----


def write_trials(folder: Path, trials: Sequence[TrialRecord], provenance: Provenance) -> None:
    """Writes ``trials.parquet`` and ``epochs.parquet`` into ``folder``, in the order given (that of submission).

    Raises:
        OSError: the folder is missing, or the disk is full; files that were there are as they were.
    """
    assert len({trial.trial_id for trial in trials}) == len(trials), "trial ids must be unique"
    epochs = [{"trial_id": trial.trial_id} | vars(epoch) for trial in trials for epoch in trial.epochs]
    # Epochs first: a crash between the two leaves no trial without its epochs.
    write_parquet(_build_table("epochs", epochs, provenance), folder / "epochs.parquet")
    write_parquet(_build_table("trials", [_to_row(t) for t in trials], provenance), folder / "trials.parquet")


def write_best(folder: Path, ranked: Sequence[TrialRecord], provenance: Provenance) -> None:
    """Writes ``best.parquet`` into ``folder``: ``ranked`` as ranks 1, 2, ...

    Raises:
        OSError: the folder is missing, or the disk is full; a file that was there is as it was.
    """
    assert ranked, "a best file without a trial is not written"
    rows = [{"rank": rank} | _to_row(trial) for rank, trial in enumerate(ranked, start=1)]
    write_parquet(_build_table("best", rows, provenance), folder / "best.parquet")


def _to_row(trial: TrialRecord) -> dict[str, Any]:
    return vars(trial) | vars(trial.config) | (vars(trial.last) if trial.last else {})


def _build_table(kind: str, rows: list[dict[str, Any]], provenance: Provenance) -> pa.Table:
    """``rows`` under the schema of ``kind``: keys that are no column are left out, columns without a key are null."""
    table = pa.Table.from_pylist(rows, schema=SCHEMAS[kind])
    origin = dataclasses.asdict(provenance)
    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "provenance": origin,
        "provenance_checksum": _checksum(origin),
        "column_checksums": {name: _checksum(table[name].to_pylist()) for name in table.column_names},
    }
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(about, allow_nan=False)})


def _checksum(values: Any) -> int:
    """CRC-32 of the values themselves: Parquet's page checksums cover neither page headers nor the footer."""
    return zlib.crc32(json.dumps(values, sort_keys=True, default=str).encode())


def write_parquet(table: pa.Table, path: Path) -> None:
    """Writes ``table`` to ``path`` whole or not at all; see :func:`write_atomically`."""
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets ``write`` fill ``path`` whole or not at all: temporary name, fsync, rename, fsync of the folder.

    Raises:
        OSError: nothing was written; what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- read ----


def load_best(path: str | Path, rank: int = 1) -> TrialConfig:
    """The configuration of ``rank`` in ``best.parquet``; ``path`` is that file or its run's folder.

    Raises:
        InputError: the file is missing, damaged, not ours or of another version, or has no such rank.
    """
    path = _locate(path, "best")
    row = _pick_rank(path, rank)
    with _placed(path, row):
        return _build(TrialConfig, row)


def load_best_record(path: str | Path, rank: int = 1) -> TrialRecord:
    """The trial of ``rank`` in ``best.parquet``, with its epochs where ``epochs.parquet`` lies beside, else its last.

    Raises:
        InputError: as for `load_best`.
    """
    path = _locate(path, "best")
    row = _pick_rank(path, rank)
    beside = path.with_name("epochs.parquet")
    return _to_record(path, row, _read_epochs(beside) if beside.exists() else None)


def load_trials(path: str | Path) -> list[TrialRecord]:
    """All trials of a run in order of submission; ``path`` is its folder, or its ``trials.parquet``.

    Raises:
        InputError: a file is missing, damaged, not ours or of another version, or the two do not belong together.
    """
    path = _locate(path, "trials")
    rows = _read_rows(path, "trials")
    epochs = _read_epochs(_locate(path.parent, "epochs"))
    trials = [_to_record(path, row, epochs) for row in rows]
    if len({trial.trial_id for trial in trials}) < len(trials):
        raise InputError(f"{path}: trial_id: must be unique")
    return trials


def load_provenance(path: str | Path) -> Provenance:
    """Where a run comes from; ``path`` is any of its Parquet files or its folder.

    Raises:
        InputError: the file is missing, damaged, not ours or of another version.
    """
    path = _locate(path, "trials", "best", "epochs")
    with _placed(path), _refusing_damage(), pq.ParquetFile(path) as file:
        about = _read_about(file)
        if _checksum(about["provenance"]) != about["provenance_checksum"]:
            raise InputError("provenance: must match its checksum: the file is damaged or was edited")
        return _build(Provenance, about["provenance"])


def _locate(path: str | Path, *kinds: str) -> Path:
    """``path`` itself where it is a file, else the first file of ``kinds`` in that folder."""
    path = Path(path)
    candidates = [path / f"{kind}.parquet" for kind in kinds] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise InputError(f"{path}: must hold {' or '.join(candidate.name for candidate in candidates)}")
    raise InputError(f"{path}: must be a Parquet file or the folder of a run, but does not exist")


@contextlib.contextmanager
def _placed(path: Path, row: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Says in an InputError's message where it was: the file, and the trial where it is about a row."""
    try:
        yield
    except InputError as error:
        trial = "" if row is None else f"trial {shown(row['trial_id'])}: "
        raise InputError(f"{path}: {trial}{error}") from error.__cause__


# What pyarrow and json were seen to raise on damaged bytes; MemoryError: a length, RecursionError: nested JSON.
_DECODING_ERRORS: tuple[type[BaseException], ...] = (pa.ArrowException, OSError, ValueError, TypeError, LookupError)
_DECODING_ERRORS += (ArithmeticError, MemoryError, RecursionError)


@contextlib.contextmanager
def _refusing_damage() -> Iterator[None]:
    """Makes an InputError of whatever pyarrow and json raise on bytes that they cannot decode."""
    try:
        yield
    except InputError:
        raise
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"must be a readable, undamaged Parquet file of tune_amp ({reason})") from error


def _read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of a file of ``kind``, only the columns of its schema: others are a later version's business."""
    with _placed(path), _refusing_damage(), pq.ParquetFile(path, page_checksum_verification=True) as file:
        about = _read_about(file)
        if about["kind"] != kind:
            raise InputError(f"kind: must be {kind}, got {shown(about['kind'])}")
        schema = SCHEMAS[kind]
        _check_columns(file.schema_arrow, schema)
        table = file.read(columns=schema.names)
        columns = {name: table[name].to_pylist() for name in schema.names}
        for name, values in columns.items():
            if _checksum(values) != about["column_checksums"][name]:
                raise InputError(f"{name}: must match its checksum: the file is damaged or was edited")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _read_about(file: pq.ParquetFile) -> dict[str, Any]:
    """What we wrote into the file's metadata, its sizes and version checked."""
    for what, most in {"columns": MOST_COLUMNS, "rows": MOST_ROWS}.items():
        count = getattr(file.metadata, f"num_{what}")
        if not 0 <= count <= most:
            raise InputError(f"must have at most {most:,} {what}, got {count:,}")
    text = (file.metadata.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        raise InputError(f"must be written by tune_amp, but has no {METADATA_KEY!r} metadata")
    about: dict[str, Any] = json.loads(text)
    if about["schema_version"] != SCHEMA_VERSION:
        version = shown(about["schema_version"])
        raise InputError(f"was written by schema version {version}; this tune_amp reads {SCHEMA_VERSION}")
    return about


def _check_columns(found: pa.Schema, expected: pa.Schema) -> None:
    for column in expected:
        indices = found.get_all_field_indices(column.name)
        if len(indices) != 1:
            raise InputError(f"{column.name}: must be a column, once, got it {len(indices)} times")
        got = found.field(indices[0]).type
        if got != column.type:
            raise InputError(f"{column.name}: must be a column of type {column.type}, got {shown(str(got))}")


def _pick_rank(path: Path, rank: int) -> dict[str, Any]:
    ranked = {row["rank"]: row for row in _read_rows(path, "best") if row["rank"] is not None}
    if rank not in ranked:
        raise InputError(f"{path}: rank: must be one of 1..{len(ranked)}, got {shown(rank)}")
    return ranked[rank]


def _read_epochs(path: Path) -> dict[str, list[EpochMetrics]]:
    epochs: dict[str, list[EpochMetrics]] = {}
    for row in _read_rows(path, "epochs"):
        with _placed(path, row):
            epochs.setdefault(row["trial_id"], []).append(_build(EpochMetrics, row))
    return epochs


def _to_record(path: Path, row: dict[str, Any], epochs: Mapping[str, list[EpochMetrics]] | None) -> TrialRecord:
    """The trial of a row, with its own of ``epochs``; None: only the last epoch is known, from the row itself."""
    with _placed(path, row):
        if row["status"] not in list(TrialStatus):
            raise InputError(f"status: must be one of {', '.join(TrialStatus)}, got {shown(row['status'])}")
        nested = {"config": _build(TrialConfig, row), "epochs": _select_epochs(row, epochs)}
        return _build(TrialRecord, row | nested | {"status": TrialStatus(row["status"])})


def _select_epochs(row: dict[str, Any], epochs: Mapping[str, list[EpochMetrics]] | None) -> tuple[EpochMetrics, ...]:
    """A trial's epochs up to the last that its row knows: after a crash ``epochs.parquet`` may be one write ahead."""
    last = row["epoch"]
    if last is None:
        return ()
    if epochs is None:
        return (_build(EpochMetrics, row),)
    own = tuple(epoch for epoch in epochs.get(row["trial_id"], ()) if epoch.epoch <= last)
    if not own or own[-1].epoch != last:
        raise InputError(f"epoch: epochs.parquet must hold epoch {last} of this trial: the files are of different runs")
    return own


def _build(source: type[_T], values: Mapping[str, Any]) -> _T:
    """A ``source`` from those of ``values`` that are its fields; lists become tuples.

    Raises:
        InputError: a field is absent, or null where it cannot be, or breaks a rule of ``source``.
    """
    arguments = {}
    for name, (optional, has_default) in _FIELD_RULES[source].items():
        if name not in values and has_default:
            continue
        value = values.get(name)
        if value is None and not optional:
            raise InputError(f"{name}: must be there, got null")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return source(**arguments)


def _list_field_rules(source: type) -> dict[str, tuple[bool, bool]]:
    """Of each field: whether it may be None, and whether it has a default."""
    hints = typing.get_type_hints(source)
    defaults = {field.name: field.default is not dataclasses.MISSING for field in dataclasses.fields(source)}
    return {name: (_split_optional(hints[name])[1], has_default) for name, has_default in defaults.items()}


# Listed once: resolving the annotations costs more than building a row.
_FIELD_RULES: Mapping[type, Mapping[str, tuple[bool, bool]]] = {
    source: _list_field_rules(source) for source in (TrialConfig, EpochMetrics, TrialRecord, Provenance)
}
