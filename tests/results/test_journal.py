import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_amp.results.journal import Journal, cut_torn_line, read_journal
from tune_amp.trial.config import InputError

EVENTS = [{"event": "trial", "at": number + 0.5, "name": f"trial ü {number}\n"} for number in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "reports.journal"
    with Journal(path) as journal:
        for event in EVENTS:
            journal.append(event)
    return path


def test_events_are_read_as_they_were_appended(path: Path) -> None:
    assert read_journal(path) == EVENTS
    assert path.read_text().count("\n") == len(EVENTS)  # one line each, whatever they hold


def test_numbers_that_json_does_not_know_come_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append({"loss": math.nan, "scale": math.inf, "lr": 0.1 + 0.2})
    [event] = read_journal(tmp_path / "j")
    assert math.isnan(event["loss"])
    assert (event["scale"], event["lr"]) == (math.inf, 0.1 + 0.2)


def test_journal_cut_anywhere_holds_every_event_that_is_whole(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole, start=1) if byte == ord("\n")]
    cut = tmp_path / "cut"
    for length in range(len(whole) + 1):
        cut.write_bytes(whole[:length])
        expected = EVENTS[: sum(end <= length for end in ends)]
        assert read_journal(cut) == expected
        cut_torn_line(cut)
        assert cut.stat().st_size == max((end for end in ends if end <= length), default=0)
        with Journal(cut) as journal:
            journal.append({"event": "next"})
        assert read_journal(cut) == [*expected, {"event": "next"}]


def test_torn_line_longer_than_a_block_is_cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    cut_torn_line(path)
    assert path.read_bytes() == whole


@given(place=st.integers(min_value=0), byte=st.integers(0, 255))
def test_damage_in_a_line_is_refused_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "j"
    with Journal(path) as journal:
        for event in EVENTS:
            journal.append(event)
    content = bytearray(path.read_bytes())
    place %= len(content)
    if content[place] in (byte, ord("\n")) or byte == ord("\n"):
        return
    number = content[:place].count(b"\n") + 1
    content[place] = byte
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_journal(path)
    assert str(caught.value) == f"{path}: line {number}: must match its checksum: the file is damaged or was edited"


@pytest.mark.parametrize("content", [b"\n", b"zz\n", b"00000000 \n", b"8f6f3f2e []\n", b"[" * 100_000 + b"\n"])
def test_what_no_journal_holds_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(InputError, match="line 1: must match its checksum"):
        read_journal(tmp_path / "j")


def test_missing_journal_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_journal(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path}/none: cannot be read (No such file or directory)"


def test_journal_has_one_writer(path: Path) -> None:
    with Journal(path), pytest.raises(InputError) as caught:
        Journal(path)
    assert str(caught.value) == f"{path}: is being written: the run is still active in another process"
    Journal(path).__exit__()


DYING = """
import os, sys
from pathlib import Path
from tune_amp.results.journal import Journal

journal = Journal(Path(sys.argv[1]))
journal.append({"event": "last words"})
os.kill(os.getpid(), 9)
"""


def test_writer_that_is_killed_leaves_its_events_and_no_lock(path: Path) -> None:
    subprocess.run([sys.executable, "-c", DYING, str(path)], check=False, timeout=60)
    with Journal(path):
        assert read_journal(path) == [*EVENTS, {"event": "last words"}]


def test_event_for_which_there_is_no_room_leaves_the_journal_as_it_was(path: Path) -> None:
    """A limit on the size of files stands for a full disk: a part of the line is written, then comes the error."""
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                journal.append({"event": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        journal.append({"event": "again"})
    assert read_journal(path) == [*EVENTS, {"event": "again"}]


def test_events_are_on_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with Journal(path) as journal:
        journal.append({"event": "x"})
    assert synced == [path.stat().st_size]
