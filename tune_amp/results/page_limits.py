"""Limits how far a Parquet file may expand, checked before it is read: a kilobyte can expand to gigabytes.

The footer of a file can claim anything. What a reader allocates follows from the header of each page, and from how
often a string of a dictionary is repeated. This module checks both, and refuses a file that would become far larger
than it is. It reads the headers itself: pyarrow's ``FileMetaData`` does not show pages, and aborts the process if a row
group or a column is damaged. https://parquet.apache.org/docs/file-format/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import dataclasses
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from tune_amp.trial.config import InputError

MOST_FOOTER_BYTES = 2**20
"""Footers of tune_amp's files have tens of kilobytes; those of a million columns have hundreds of megabytes."""
FREE_BYTES = 2**26
MOST_EXPANSION = 100
"""A file may take up to ``FREE_BYTES`` plus this many times its size in Arrow's memory. The most repetitive file of
tune_amp that was measured takes 21 times its size."""

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # length of the footer, and the magic
_HEADER_WINDOW = 2**16  # bytes read for a page header; in tune_amp's files it has at most two strings of 4 KiB
_MOST_DEPTH = 20
_BYTE_ARRAY = 6
_PLAIN_ENCODINGS = {0, 2, 3, 8}  # PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY: what pyarrow writes by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnPages:
    """The position of the values of a column, for one row group."""

    path: str
    """Name of the column; of a list column ``inert.list.element``."""
    is_text: bool
    rows: int
    values: int
    start: int
    end: int


def find_footer(path: Path) -> tuple[int, int]:
    """Return the position of a file's footer and its length, or 0 and 0 if there is none.

    Raises:
        InputError: it is too large. A file that is not Parquet is left to pyarrow to refuse.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    length, magic = struct.unpack("<I4s", tail.rjust(_TAIL_BYTES))
    if magic != _MAGIC or length + _TAIL_BYTES > size:
        return 0, 0
    if length > MOST_FOOTER_BYTES:
        raise InputError(f"must have a footer of at most {MOST_FOOTER_BYTES:,} bytes, got {length:,}")
    return size - _TAIL_BYTES - length, length


def list_pages(path: Path, columns: Collection[str]) -> list[ColumnPages]:
    """Return the positions of ``columns`` in a file.

    Raises:
        InputError: the footer is too large, or values are in another file.
        ValueError: the footer cannot be read.
        OSError: the file cannot be read.
    """
    start, length = find_footer(path)
    with path.open("rb") as file:
        footer = _CompactReader(os.pread(file.fileno(), length, start)).read_struct()
    groups = _get(footer, 4, list)
    pages = [_locate_pages(group[3], chunk) for group in groups for chunk in _get(group, 1, list)]
    return [column for column in pages if column.path.partition(".")[0] in columns]


def check_pages(path: Path, columns: Collection[ColumnPages]) -> None:
    """Refuse columns that would expand beyond the limit according to their page headers.

    Raises:
        InputError: they would, or they use an encoding that tune_amp never writes.
        ValueError: a page header cannot be read.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        expanded = 0
        for column in columns:
            expanded += 8 * max(column.rows, column.values)
            _check_growth(size, expanded, "rows")
        for column in columns:
            for uncompressed, values in _read_pages(file, size, column):
                expanded += uncompressed + 8 * values
                _check_growth(size, expanded, "pages")


def check_texts(path: Path, table: pa.Table) -> None:
    """Refuse strings that would expand beyond the limit when decoded; ``table`` still has them as dictionaries.

    Raises:
        InputError: the strings would expand beyond the limit.
    """
    expanded = 0
    for array in (chunk for column in table.columns for chunk in column.chunks):
        texts = array.values if pa.types.is_list(array.type) else array
        if pa.types.is_dictionary(texts.type):
            lengths = pc.binary_length(texts.dictionary).cast(pa.int64())
            expanded += pc.sum(lengths.take(texts.indices)).as_py() or 0
    _check_growth(path.stat().st_size, expanded, "texts")


def _locate_pages(rows: Any, chunk: Any) -> ColumnPages:
    if 1 in _typed(chunk, dict):
        raise InputError("must hold its own values, but names another file for them")
    about = _get(chunk, 3, dict)
    path = b".".join(_get(about, 3, list)).decode()
    data, dictionary = _get(about, 9, int), about.get(11, 0)
    start = dictionary if 0 < dictionary < data else data
    return ColumnPages(
        path=path,
        is_text=about[1] == _BYTE_ARRAY,
        rows=_typed(rows, int),
        values=_get(about, 5, int),
        start=start,
        end=start + _get(about, 7, int),
    )


def _get(fields: Any, number: int, kind: type) -> Any:
    return _typed(_typed(fields, dict)[number], kind)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"the footer holds a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _check_growth(size: int, expanded: int, what: str) -> None:
    allowed = FREE_BYTES + MOST_EXPANSION * size
    if expanded > allowed:
        rule = f"its {what} must expand to at most {allowed:,} bytes, for a file of {size:,}"
        raise InputError(f"{rule}, got {expanded:,} or more")


def _read_pages(file: BinaryIO, size: int, column: ColumnPages) -> Iterator[tuple[int, int]]:
    """Yield for each page its decompressed bytes and its number of values."""
    if column.values <= 0:
        return  # pyarrow reads no page either
    at = column.start
    if not 0 < at <= column.end <= size:
        raise ValueError(f"pages from {at} to {column.end} of a file of {size} bytes")
    while at < column.end:
        reader = _CompactReader(os.pread(file.fileno(), min(_HEADER_WINDOW, column.end - at), at))
        header = reader.read_struct()
        uncompressed, compressed = _get(header, 2, int), _get(header, 3, int)
        if uncompressed < 0 or compressed < 0:
            raise ValueError("a page of negative size")
        yield uncompressed, max((_count_values(header, *kind) for kind in _PAGE_KINDS if kind[0] in header), default=0)
        at += reader.at + compressed


_PAGE_KINDS = ((5, 2), (7, 2), (8, 4))
"""Fields of a page header for data, dictionary and version-2 data pages, each with its field for the encoding."""


def _count_values(header: dict[int, Any], kind: int, encoding_field: int) -> int:
    page = _get(header, kind, dict)
    encoding = _get(page, encoding_field, int)
    if encoding not in _PLAIN_ENCODINGS:
        raise InputError(f"must be encoded as tune_amp does, got encoding number {encoding}")
    values: int = _get(page, 1, int)
    return values


class _CompactReader:
    """A reader of Thrift's compact protocol as Parquet uses it.

    It is stricter than other readers, so that none of them can read the same bytes differently: no field may occur
    twice, and no number may have more bits than its type.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        """Return field number -> value."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._read_byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._read_number(16)
            if number in fields:
                raise ValueError("a field stands twice")
            fields[number] = kind == 1 if kind in (1, 2) else self._read_value(kind, depth + 1)
        return fields

    def _read_value(self, kind: int, depth: int) -> Any:
        if depth == _MOST_DEPTH:
            raise ValueError("structures are nested too deep")
        if kind in (1, 2, 3):  # booleans, one a byte in a list, and bytes
            return self._read_byte()
        if kind in _NUMBER_BITS:
            return self._read_number(_NUMBER_BITS[kind])
        if kind in (7, 8):
            return self._read_bytes(8 if kind == 7 else self._read_varint(32))
        if kind in (9, 10):
            head = self._read_byte()
            count = head >> 4 if head >> 4 < 15 else self._read_varint(32)
            return [self._read_value(head & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.read_struct(depth + 1)
        raise ValueError(f"there is no type {kind}")

    def _read_byte(self) -> int:
        return self._read_bytes(1)[0]

    def _read_bytes(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise ValueError("a structure does not end")
        return self._data[begin : self.at]

    def _read_varint(self, bits: int) -> int:
        value = 0
        for shift in range(0, bits, 7):
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128 and value < 1 << bits:
                return value
        raise ValueError(f"a number has more than {bits} bits")

    def _read_number(self, bits: int) -> int:
        value = self._read_varint(bits)
        return (value >> 1) ^ -(value & 1)


_NUMBER_BITS = {4: 16, 5: 32, 6: 64}
