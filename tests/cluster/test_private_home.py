"""Folders of killed processes are removed, and nothing that a user or another program put in the way."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tune_amp.cluster.private_home import HOME_PREFIX, OWNER_FILE, private_home

# Makes a home, puts a file, a folder and a link to a folder of the user's into it, and waits to be killed.
OWNER = """
import os, sys, time
from pathlib import Path
from tune_amp.cluster.private_home import private_home

with private_home(Path(sys.argv[1])) as home:
    (home / "token").touch()
    (home / "ray" / "logs").mkdir(parents=True)
    (home / "ray" / "latest").symlink_to(sys.argv[2])
    (home / "link").symlink_to(sys.argv[2])
    print(home, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A temporary folder."""
    (tmp_path / "places").mkdir()
    return tmp_path / "places"


@pytest.fixture
def users_own(tmp_path: Path) -> Path:
    """A folder elsewhere, with a file in it."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "weights").write_bytes(b"mine")
    return tmp_path / "own"


@pytest.fixture
def owner(places: Path, users_own: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A living process, and its home."""
    command = [sys.executable, "-c", OWNER, str(places), str(users_own)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def list_contents(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Everything below: its mode, when it was changed, and what it holds."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        holds = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, holds)
    return found


def make_home(places: Path) -> None:
    """What each search does as it starts and ends."""
    with private_home(places) as home:
        assert home.parent == places


def test_home_is_private_and_gone_in_the_end(places: Path) -> None:
    umask = os.umask(0)
    try:
        with private_home(places) as home:
            (home / "file").touch()
            assert home.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(umask)
    assert list(places.iterdir()) == []


def test_home_of_a_killed_process_is_removed_and_what_its_links_lead_to_stays(
    owner: tuple[subprocess.Popen[str], Path], places: Path, users_own: Path
) -> None:
    process, home = owner
    before = list_contents(users_own)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (home / "ray" / "logs").is_dir()
    make_home(places)
    assert list(places.iterdir()) == []
    assert list_contents(users_own) == before


def test_home_of_a_living_process_stays(owner: tuple[subprocess.Popen[str], Path], places: Path) -> None:
    _, home = owner
    before = list_contents(home)
    os.utime(home, (0, 0))
    os.utime(home, ns=(before[str(home)][1],) * 2)
    make_home(places)
    assert list_contents(home) == before


def test_folders_of_users_are_left_untouched_whatever_they_are_called(
    owner: tuple[subprocess.Popen[str], Path], places: Path, users_own: Path
) -> None:
    """Old ones, with a lock of nobody's, with a proof that is another home's, and links to a home."""
    process, home = owner
    process.kill()
    process.wait()
    proof = (home / OWNER_FILE).read_text()
    names = ("tune_amp_x", "tune_amp_results", "tune_amp_data", f"{HOME_PREFIX}", f"{HOME_PREFIX}abcdefgh")
    for name in (*names, f"{HOME_PREFIX}empty_01", f"{HOME_PREFIX}foreign1", f"{HOME_PREFIX}dirproof"):
        (places / name).mkdir()
    for name in names:
        (places / name / "pyvenv.cfg").write_text("home = /usr/bin")
        (places / name / "alive").touch()
    (places / f"{HOME_PREFIX}foreign1" / OWNER_FILE).write_text("somebody else")
    (places / f"{HOME_PREFIX}dirproof" / OWNER_FILE).mkdir()
    shutil.copytree(home, places / f"{HOME_PREFIX}copied01", symlinks=True)
    (places / f"{HOME_PREFIX}longer01").mkdir()
    (places / f"{HOME_PREFIX}longer01" / OWNER_FILE).write_text(proof + "and more")
    (places / f"{HOME_PREFIX}linked01").symlink_to(users_own)
    (users_own / OWNER_FILE).write_text(proof)
    (places / f"{HOME_PREFIX}proofln1").mkdir()
    (places / f"{HOME_PREFIX}proofln1" / OWNER_FILE).symlink_to(home / OWNER_FILE)
    os.mkfifo(places / f"{HOME_PREFIX}pipe")
    for path in places.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (0, 0))
    kept = {path: list_contents(path) for path in places.iterdir() if path != home}
    assert len(kept) == 13
    own = list_contents(users_own)
    make_home(places)
    assert not home.exists()
    assert {path: list_contents(path) for path in places.iterdir()} == kept
    assert list_contents(users_own) == own


def test_home_of_another_machine_stays(
    owner: tuple[subprocess.Popen[str], Path], places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a folder that machines share, a lock of theirs may look free from here."""
    process, home = owner
    process.kill()
    process.wait()
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr("tune_amp.cluster.private_home._BOOT_ID", tmp_path / "boot_id")
    make_home(places)
    assert list(places.iterdir()) == [home]


def test_folder_that_took_the_place_of_a_home_stays(places: Path) -> None:
    """A program that cleans temporary folders removed the home meanwhile."""
    with private_home(places) as home:
        shutil.rmtree(home)
        home.mkdir()
        (home / "mine").touch()
    assert (home / "mine").exists()


MOUNTING = """
import os, sys, subprocess
from pathlib import Path
from tune_amp.cluster.private_home import OWNER_FILE, private_home

places, own = map(Path, sys.argv[1:])
if os.fork() == 0:
    with private_home(places) as home:
        (home / "mounted").mkdir()
        subprocess.run(["mount", "--bind", own, home / "mounted"], check=True)
        os._exit(0)
os.wait()
[home] = places.iterdir()
with private_home(places):
    pass
print(home.exists(), (home / "mounted" / "weights").exists())
subprocess.run(["umount", home / "mounted"], check=True)
with private_home(places):
    pass
print(home.exists())
"""


def test_home_below_which_something_is_mounted_stays_until_it_no_longer_is(users_own: Path, tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything")
    places = tmp_path / "with a blank"
    places.mkdir()
    command = [*alone, sys.executable, "-c", MOUNTING, str(places), str(users_own)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr
    assert (users_own / "weights").read_bytes() == b"mine"
