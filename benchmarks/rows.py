"""The file of a measurement: its rows, with the moment, the machine and the versions in the metadata."""

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from tune_amp.results.parquet import build_columns, build_table, write_parquet


def describe_measurement(machine: Mapping[str, str], versions: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Return the metadata of a measurement that ends now."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "machine": dict(machine), "versions": dict(versions), **more}


def write_rows(path: Path, kind: str, of: type, rows: Iterable[object], about: Mapping[str, Any]) -> None:
    """Write ``rows``, dataclasses of the type ``of``, and what they rest on."""
    schema = pa.schema(build_columns(of))
    write_parquet(build_table(kind, schema, [vars(row) for row in rows], about), path)
