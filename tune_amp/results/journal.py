"""The journal of a run: one line an event, written to disk before it counts; a killed search resumes from it.

Each line is a CRC-32 and JSON. A last line that a killed process or a full disk left incomplete is not an event, and is
cut off before the next is appended; damage anywhere else is refused. Nothing that is read is unpickled or evaluated.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tune_amp.trial.config import InputError

JOURNAL_VERSION = 3


class Journal:
    """The open journal of a run, locked by this process for as long as it lives. Use it as a context manager.

    Args:
        path: the file, created if it does not exist.

    Raises:
        InputError: it cannot be written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise InputError(f"{path}: is being written: the run is still active in another process") from None
            raise InputError(f"{path}: cannot be locked ({error.strerror}): choose another --results-dir") from error
        self._end = self._file.tell()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, event: Mapping[str, Any]) -> None:
        """Write an event and wait until it is on disk.

        Raises:
            OSError: it could not be written; the journal is unchanged.
        """
        line = _encode(event)
        try:
            _write_all(self._file, line)
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(line)

    def cut_torn_line(self) -> None:
        """Cut off a last line that a killed process left incomplete."""
        cut_torn_line(self._path)
        self._end = self._path.stat().st_size


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return all events, without a last one that is incomplete.

    Raises:
        InputError: there is no journal, or it is damaged; the message names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    events = []
    for number, line in enumerate(lines[:-1], start=1):
        event = _decode(line)
        if event is None:
            raise InputError(f"{path}: line {number}: must match its checksum: the file is damaged or was edited")
        events.append(event)
    return events


def cut_torn_line(path: Path) -> None:
    """Cut a file of lines after its last complete line."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _write_all(file: IO[bytes], line: bytes) -> None:
    while line:  # a nearly full disk accepts a part, and raises at the next write
        line = line[file.write(line) :]


def _encode(event: Mapping[str, Any]) -> bytes:
    text = json.dumps(event, separators=(",", ":")).encode()  # NaN and infinity as Python's json writes them
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
