"""Reads and writes checked Parquet files: schemas built from dataclasses, checksums, written whole or not at all.

Nothing that is read is unpickled or evaluated. A file that is damaged, not from tune_amp or of another version is
refused with the reason.
"""

import contextlib
import dataclasses
import datetime
import json
import types
import typing
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tune_amp.results.files import write_atomically
from tune_amp.results.page_limits import check_pages, check_texts, find_footer, list_pages
from tune_amp.trial.config import SPREAD, InputError, TrialStatus
from tune_amp.trial.text import shown

SCHEMA_VERSION = 6
OLDEST_VERSION = 2
"""Oldest schema version that is still read: the columns that its files lack have a default, or can be null."""

METADATA_KEY = "tune_amp"

# A file that claims more is damaged or hostile: it is refused before anything of that size is allocated.
MOST_COLUMNS = 1_000
MOST_ROWS = 10_000_000


# ---- schemas ----

_ARROW_TYPES: Mapping[Any, pa.DataType] = {
    float: pa.float64(),
    int: pa.int64(),
    str: pa.string(),
    bool: pa.bool_(),
    TrialStatus: pa.string(),
    datetime.datetime: pa.timestamp("us", tz="UTC"),
    tuple[int, ...]: pa.list_(pa.field("element", pa.int64(), nullable=False)),
    tuple[str, ...]: pa.list_(pa.field("element", pa.string(), nullable=False)),
    tuple[float, ...]: pa.list_(pa.field("element", pa.float64(), nullable=False)),
}


def split_optional(hint: Any) -> tuple[Any, bool]:
    """Return a field's type without ``None``, and whether ``None`` was part of it."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    [plain] = set(typing.get_args(hint)) - {types.NoneType}
    return plain, True


def build_columns(source: type, *, of_trials: bool = False) -> list[pa.Field]:
    """Return a column for each described field; ``of_trials``: nullable, as a trial may end before its first report."""
    hints = typing.get_type_hints(source)
    columns = []
    for field in dataclasses.fields(source):
        if not field.metadata or field.name in SPREAD or (of_trials and field.metadata["epoch_only"]):
            continue
        plain, optional = split_optional(hints[field.name])
        unit, description = field.metadata["unit"], field.metadata["doc"]
        metadata = {"description": description} | ({"unit": unit} if unit else {})
        if field.default not in (dataclasses.MISSING, None):
            metadata["default"] = json.dumps(field.default)  # the value for files that are older than the column
        columns.append(pa.field(field.name, _ARROW_TYPES[plain], nullable=optional or of_trials, metadata=metadata))
    return columns


def _build_own_columns(rows: Iterable[Mapping[str, Any]], known: Iterable[str]) -> list[pa.Field]:
    """Return a column for each name in the ``SPREAD`` fields of the rows; its metadata names that field.

    Raises:
        InputError: a name is that of another column, or its values are of different types.
    """
    kinds: dict[tuple[str, str], set[type]] = {}
    for row in rows:
        for field in SPREAD:
            for name, value in row.get(field, {}).items():
                kinds.setdefault((field, name), set()).add(type(value))
    columns = []
    for (field, name), found in sorted(kinds.items()):
        column = f"{SPREAD[field]}{name}"
        kind = float if found == {int, float} else next(iter(found)) if len(found) == 1 else None
        if column in known or kind not in _OWN_TYPES:
            got = "that of another column" if column in known else " and ".join(sorted(t.__name__ for t in found))
            raise InputError(f"{column}: must be a name of its own with values of one type, got {got}")
        columns.append(pa.field(column, _ARROW_TYPES[kind], metadata={"of": field}))
    return columns


_OWN_TYPES = (float, int, str)


# ---- write ----


def build_table(
    kind: str,
    schema: pa.Schema,
    rows: list[dict[str, Any]],
    origin: Mapping[str, Any],
    slot_time: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Return ``rows`` as a table of ``schema``: keys that are not columns are omitted, columns without a key are null.

    Args:
        kind: the kind of file, by which ``read_file`` reads it.
        schema: from ``build_columns``; columns are added for what the ``SPREAD`` fields of the rows hold.
        rows: column or ``SPREAD`` field -> value.
        origin: where the rows come from, in types that JSON has.
        slot_time: slots and seconds that producing the rows took, in types that JSON has, if known.
    """
    own = _build_own_columns(rows, schema.names)
    spread = [
        {f"{SPREAD[field]}{name}": value for field in SPREAD for name, value in row.get(field, {}).items()} | row
        for row in rows
    ]
    table = pa.Table.from_pylist(spread if own else rows, schema=pa.schema([*schema, *own]))
    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "provenance": dict(origin),
        "provenance_checksum": checksum(dict(origin)),
        "column_checksums": {name: checksum(table[name].to_pylist()) for name in table.column_names},
    }
    if slot_time is not None:
        about |= {"slot_time": dict(slot_time), "slot_time_checksum": checksum(dict(slot_time))}
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(about, allow_nan=False)})


def checksum(values: Any) -> int:
    """Return the CRC-32 of the values: Parquet's page checksums cover neither page headers nor the footer."""
    return zlib.crc32(json.dumps(values, sort_keys=True, default=str).encode())


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write ``table`` to ``path`` whole or not at all; see :func:`files.write_atomically`."""
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True))


# ---- read ----


def read_origin(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the kind of a file and where its rows come from, as ``build_table`` got them; raise as ``read_file``."""
    with _opened(path) as (_, about):
        return str(about["kind"]), _read_part(about, "provenance")


def _read_part(about: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a checksummed part of tune_amp's entry in a file's metadata."""
    part = about[name]
    if checksum(part) != about[f"{name}_checksum"]:
        raise InputError(f"{name}: must match its checksum: the file is damaged or was edited")
    if not isinstance(part, dict):
        raise InputError(f"{name}: must be a mapping, got {shown(part)}")
    return part


@contextlib.contextmanager
def placed(path: Path, row: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Add the place to the message of an InputError: the file, and the trial if the error is about a row."""
    try:
        yield
    except InputError as error:
        trial = "" if row is None else f"trial {shown(row['trial_id'])}: "
        raise InputError(f"{path}: {trial}{error}") from error.__cause__


# Exceptions seen from pyarrow and json on damaged bytes; MemoryError: a wrong length, RecursionError: nested JSON.
_DECODING_ERRORS: tuple[type[BaseException], ...] = (pa.ArrowException, OSError, ValueError, TypeError, LookupError)
_DECODING_ERRORS += (ArithmeticError, MemoryError, RecursionError)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[pq.ParquetFile, dict[str, Any]]]:
    """Open a file, and read tune_amp's entry in its metadata, after checking its sizes and version.

    Any exception that pyarrow and json raise on bytes that they cannot decode becomes an InputError.
    """
    with placed(path):
        try:
            find_footer(path)  # refuses one that is too large
            with pq.ParquetFile(path) as file:
                yield file, _read_about(file)
        except InputError:
            raise
        except _DECODING_ERRORS as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"must be a readable, undamaged Parquet file of tune_amp ({reason})") from error


class FileContent(NamedTuple):
    """A file, read and checked."""

    rows: list[dict[str, Any]]
    origin: dict[str, Any]
    """Where the rows come from, as passed to ``build_table``."""
    slot_time: dict[str, Any] | None
    """Slots and seconds that producing the rows took, if the file has them."""


def read_file(path: Path, kind: str, schema: pa.Schema) -> FileContent:
    """Read a file of ``kind``: the columns of ``schema``, those of ``SPREAD`` fields, and the metadata.

    Columns that a file of an older version lacks are filled with their default, else with null.

    Raises:
        InputError: the file is missing, damaged, not from tune_amp, or of another kind or version.
    """
    with _opened(path) as (file, about):
        if about["kind"] != kind:
            raise InputError(f"kind: must be {kind}, got {shown(about['kind'])}")
        filling = _list_filling(about, schema)
        _check_columns(file.schema_arrow, [column for column in schema if column.name not in filling])
        own = _find_own_columns(file.schema_arrow, schema)
        table = _read_columns(path, file, [*(name for name in schema.names if name not in filling), *own])
        columns = {name: table[name].to_pylist() for name in table.column_names}
        for name, values in columns.items():
            if checksum(values) != about["column_checksums"][name]:
                raise InputError(f"{name}: must match its checksum: the file is damaged or was edited")
        columns |= {name: [value] * table.num_rows for name, value in filling.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if own:
            rows = [_nest(row, own) for row in rows]
        # Files of schema 5 and older have the slot time in a part named "ledger", with other numbers.
        timed = next((name for name in ("slot_time", "ledger") if name in about), None)
        return FileContent(rows, _read_part(about, "provenance"), _read_part(about, timed) if timed else None)


def _find_own_columns(found: pa.Schema, expected: pa.Schema) -> dict[str, tuple[str, str]]:
    """Return column -> ``SPREAD`` field that it belongs to, and its name there."""
    types_of_own = [_ARROW_TYPES[kind] for kind in _OWN_TYPES]
    own = {}
    for column in found:
        field = (column.metadata or {}).get(b"of", b"").decode()
        if field in SPREAD and column.name not in expected.names:
            name = column.name.removeprefix(SPREAD[field])
            if not name.isidentifier() or column.type not in types_of_own:
                raise InputError(f"{shown(column.name)}: must be a name with numbers or texts, got {column.type}")
            own[column.name] = field, name
    return own


def _nest(row: dict[str, Any], own: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Move the values of ``own`` columns into their ``SPREAD`` fields, without those that are null."""
    nested: dict[str, dict[str, Any]] = {}
    for column, (field, name) in own.items():
        value = row.pop(column)
        if value is not None:
            nested.setdefault(field, {})[name] = value
    return row | nested


def _read_columns(path: Path, file: pq.ParquetFile, names: list[str]) -> pa.Table:
    """Read the columns after checking that they do not expand beyond the limit."""
    pages = list_pages(path, names)
    check_pages(path, pages)
    # As dictionaries first: a string that occurs a million times is stored once.
    texts = sorted({column.path for column in pages if column.is_text})
    with pq.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True) as again:
        table = again.read(columns=names)
    check_texts(path, table)
    schema = file.schema_arrow  # each access builds it anew
    return pa.table({name: table[name].cast(schema.field(name).type) for name in names})


def _read_about(file: pq.ParquetFile) -> dict[str, Any]:
    """Return tune_amp's entry in the file's metadata, after checking the file's sizes and version."""
    for what, most in {"columns": MOST_COLUMNS, "rows": MOST_ROWS}.items():
        count = getattr(file.metadata, f"num_{what}")
        if not 0 <= count <= most:
            raise InputError(f"must have at most {most:,} {what}, got {count:,}")
    text = (file.metadata.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        raise InputError(f"must be written by tune_amp, but has no {METADATA_KEY!r} metadata")
    about: dict[str, Any] = json.loads(text)
    version = about["schema_version"]
    if version not in range(OLDEST_VERSION, SCHEMA_VERSION + 1):
        readable = f"this tune_amp reads {OLDEST_VERSION} to {SCHEMA_VERSION}"
        raise InputError(f"was written by schema version {shown(version)}; {readable}")
    return about


def _list_filling(about: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Return the values of columns that are newer than the version that wrote the file.

    A missing column whose checksum is in the file is not new: the file is damaged.
    """
    if about["schema_version"] == SCHEMA_VERSION:
        return {}
    new = [column for column in schema if column.name not in about["column_checksums"]]
    defaults = {column.name: (column.metadata or {}).get(b"default") for column in new}
    return {
        column.name: json.loads(defaults[column.name] or "null")
        for column in new
        if column.nullable or defaults[column.name] is not None
    }


def _check_columns(found: pa.Schema, expected: Iterable[pa.Field]) -> None:
    for column in expected:
        indices = found.get_all_field_indices(column.name)
        if len(indices) != 1:
            raise InputError(f"{column.name}: must be a column, once, got it {len(indices)} times")
        got = found.field(indices[0]).type
        if got != column.type:
            raise InputError(f"{column.name}: must be a column of type {column.type}, got {shown(str(got))}")
