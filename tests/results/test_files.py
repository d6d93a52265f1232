"""What a command writes is whole or not there, and what somebody else has put in the way stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tune_amp.results.files import claimed_folder, write_atomically
from tune_amp.trial.config import InputError


def list_all(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# ---- a file ----


@pytest.fixture(params=["unnamed", "named"])
def flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the file system can: with files that have no name yet, or without."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT)  # refused, as O_TMPFILE is by NFS
    return str(request.param)


@pytest.mark.usefixtures("flavour")
def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in (b"long enough", b"short"):
        write_atomically(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
        assert path.read_bytes() == text
    assert list_all(tmp_path) == [path]


@pytest.mark.usefixtures("flavour")
def test_file_stays_as_it_was_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert list_all(tmp_path) == [path]


@pytest.mark.usefixtures("flavour")
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_file_that_may_not_be_replaced_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    with pytest.raises(FileExistsError):
        write_atomically(path, lambda file: file.write(b"ours"), replace=False)
    assert path.lstat() == before
    assert list_all(tmp_path) == [path]


def test_process_that_is_killed_while_it_writes_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tune_amp.results.files import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda file: (file.write(b'half'), file.flush(), os.kill(os.getpid(), 9)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list_all(tmp_path) == []


# ---- a folder ----


def test_folder_is_made_with_its_parents_and_kept_where_it_is_filled(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "a" / "b") as folder:
        assert folder == tmp_path / "a" / "b"
        (folder / "file").touch()
    assert list_all(tmp_path) == [tmp_path / "a", folder, folder / "file"]


def test_folder_that_is_left_empty_is_removed_with_the_parents_that_were_made(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()

    def interrupt() -> None:
        with claimed_folder(tmp_path / "theirs" / "a" / "b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list_all(tmp_path) == [tmp_path / "theirs"]


def test_empty_folder_of_the_users_is_taken_and_stays(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "theirs") as folder:
        pass
    assert not folder.exists()
    folder.mkdir()
    with claimed_folder(folder):
        pass
    assert folder.is_dir()


def test_folder_with_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("mine")
    before = tmp_path.stat().st_mtime_ns
    rule = f"^--output: {tmp_path} already exists and is no empty folder; choose another$"
    with pytest.raises(InputError, match=rule), claimed_folder(tmp_path):
        pytest.fail("was entered")
    assert (tmp_path / "theirs").read_text() == "mine"
    assert tmp_path.stat().st_mtime_ns == before


def test_folder_that_another_has_is_refused_while_it_is_empty_too(tmp_path: Path) -> None:
    rule = "is being written by another process; choose another$"
    with (
        claimed_folder(tmp_path / "out") as folder,
        pytest.raises(InputError, match=rule),
        claimed_folder(folder),
    ):
        pytest.fail("a second took the folder of the first")
    assert list_all(tmp_path) == []


def test_folder_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tune_amp.results.files import claimed_folder\n"
        "with claimed_folder(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    with claimed_folder(tmp_path / "out") as folder:
        (folder / "file").touch()


def test_folder_in_the_place_of_or_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, why in ((tmp_path / "file", "already exists"), (tmp_path / "file" / "out", "cannot be made")):
        with pytest.raises(InputError, match=f"^--output: {folder} {why}"), claimed_folder(folder):
            pytest.fail("was entered")
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_may_not_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as which tests may run, can write everywhere
    rule = r"^--output: [^\n]+ cannot be made \(Permission denied\)$"
    with pytest.raises(InputError, match=rule), claimed_folder(tmp_path / "out"):
        pytest.fail("was entered")
