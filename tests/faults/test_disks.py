"""Disks that are full and folders that cannot be written: the search says so and ends, or does without."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import (
    ALONE,
    Follow,
    Undisturbed,
    begin,
    check_end,
    check_readable,
    check_resumes,
    count_events,
    note_fault,
    prepare,
    read_events,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # under a minute each, on a machine of their own

SIZE = 6 * 2**20


class SmallDisk:
    """A disk of 6 MB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes free, in whole pages."""
        with self._ballast.open("ab", buffering=0) as file:
            room = shutil.disk_usage(self.path).free - left
            with contextlib.suppress(OSError):  # full before we thought
                while room > 0:
                    room -= file.write(b"\0" * min(room, 2**16))

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(place)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("left", [0, pytest.param(64 * 1024, marks=pytest.mark.long)])
def test_full_disk_ends_the_search_and_once_there_is_room_it_goes_on(
    left: int, tmp_path: Path, small_disk: SmallDisk, undisturbed: Undisturbed, follow: Follow
) -> None:
    """Without any room not even a report is kept; with 64 kB reports are, and what is exported in the end is not."""
    run = small_disk.path / "run"
    search = follow(begin(prepare(tmp_path), *ALONE, results="small"))
    kind, number = ("report", 8) if left == 0 else ("end", 5)
    search.wait_until(lambda: count_events(run, kind) >= number)
    small_disk.fill(left)
    asked = time.monotonic()
    assert search.wait() == 130, search.stderr
    ended = time.monotonic() - asked
    assert "No space left on device" in search.stderr
    assert search.find_left() == []
    check_readable(run)
    assert list(run.glob(".*")) == []
    small_disk.free()
    fault = "disk full in the search" if left == 0 else "disk full in the export"
    check_resumes(fault, search, run, undisturbed("alone"), follow, ended=ended)


@pytest.mark.long
def test_search_goes_on_where_checkpoints_find_no_room(
    tmp_path: Path, small_disk: SmallDisk, undisturbed: Undisturbed, follow: Follow
) -> None:
    """A search that cannot save is none the worse, unless its worker dies."""
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path), *ALONE, "--storage-path", str(small_disk.path)))
    search.wait_until(lambda: count_events(run, "checkpoint") >= 1)
    saved = count_events(run, "checkpoint")

    def fill() -> bool:
        """Fill the disk again: the checkpoints of a trial that ended are removed."""
        small_disk.fill()
        return count_events(run, "end") >= 5

    search.wait_until(fill)
    count = check_end(search, run, undisturbed("alone"))
    assert search.stderr == ""
    assert count_events(run, "checkpoint") <= saved + 3
    note_fault("disk full in a checkpoint", "goes on without", count, ranking_equal=True)


SECOND_SAVE_FINDS_NO_ROOM = """
import errno, signal
from ray.train._internal import storage

copy = storage._pyarrow_fs_copy_files

def copy_with_room(source, destination, *arguments, **more):
    if "checkpoint_" in destination:
        number = next(number for number in range(1, 1000) if once(f"save {number}"))
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
    return copy(source, destination, *arguments, **more)

storage._pyarrow_fs_copy_files = copy_with_room

def fault(self, images):
    for saves in (3, 4):
        if (HERE / f"save {saves}").exists() and Net.steps % 6 == 3 and once(f"died after {saves}"):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
def test_checkpoint_that_found_no_room_spoils_none_of_those_that_do(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    """Two workers die after it: the second finds what the first one's successor saved."""
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path, SECOND_SAVE_FINDS_NO_ROOM), *ALONE))
    count = check_end(search, run, undisturbed("alone"))
    assert (tmp_path / "died after 4").exists()
    assert count_events(run, "lost") == 2
    paths = [event["path"] for event in read_events(run) if event["event"] == "checkpoint"]
    assert len(set(paths)) == len(paths)  # none was written over
    note_fault("one checkpoint without room, then two workers killed", "goes on", count, faults=3, ranking_equal=True)


@pytest.mark.long
def test_search_goes_on_where_the_place_of_its_checkpoints_is_gone(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    """A share that is not mounted any more, or that somebody tidied: Ray misses a file of its own there."""
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path), *ALONE, "--storage-path", str(tmp_path / "share")))
    search.wait_until(lambda: count_events(run, "checkpoint") >= 1)
    (tmp_path / "share" / "run").rename(tmp_path / "gone")  # at once, whatever is being saved there
    count = check_end(search, run, undisturbed("alone"))
    assert search.stderr == ""
    assert count_events(run, "lost") == 0
    note_fault("the place of checkpoints gone", "goes on without", count, ranking_equal=True)


@pytest.mark.long
def test_folder_that_cannot_be_written_any_more_ends_the_search(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root without the right to write whatever it likes
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv, which takes that right away, is not here")
        prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override")
    search = follow(begin(prepare(tmp_path), *ALONE, prefix=prefix))
    search.wait_until(lambda: count_events(run, "report") >= 8)
    run.chmod(0o555)
    asked = time.monotonic()
    try:
        assert search.wait() == 130, search.stderr
        ended = time.monotonic() - asked
    finally:
        run.chmod(0o755)
    assert "Permission denied" in search.stderr
    assert search.find_left() == []
    check_readable(run)
    check_resumes("permission to write lost", search, run, undisturbed("alone"), follow, ended=ended)
