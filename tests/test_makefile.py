"""``make`` touches no environment but one that it has made itself, and loses none that works."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands for Python: what it is asked for goes into a log, `venv` makes a copy of it, pip succeeds unless told not to.
PYTHON = """#!/bin/sh
echo "$0 $*" >> "$LOG"
case "$*" in
    *"-m venv"*)
        for folder; do :; done
        if [ "$3" = --clear ]; then rm -rf "$folder"; fi
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python" ;;
    *"pip install"*) exit "$PIP" ;;
esac
"""


class Checkout:
    """A folder with our Makefile, in which nothing is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        self._python = folder / "fake-python"
        self._python.write_text(PYTHON)
        self._python.chmod(0o755)
        self._log = folder / "log"

    def make(self, target: str, *, pip: int = 0, python: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", target, f"PYTHON={python or self._python}"],
            cwd=self.folder,
            env=environment | {"LOG": str(self._log), "PIP": str(pip)},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def last(self) -> str:
        """The last that a Python was asked for."""
        return self._log.read_text().splitlines()[-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def read_all(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["folder", "link", "link to one of ours"])
def test_environment_of_another_program_is_left_alone_and_ours_made_beside_it(
    kind: str, checkout: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> None:
    theirs = checkout.folder / ".venv"
    if kind == "folder":
        theirs.mkdir()
    else:
        theirs.symlink_to(tmp_path_factory.mktemp("elsewhere"))
    (theirs / "pyvenv.cfg").write_text("uv = 0.9")
    if kind == "link to one of ours":
        (theirs / "ready").touch()
        os.utime(theirs / "ready", (0, 0))
    before = read_all(theirs)
    done = checkout.make("search")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: .venv was not made by this Makefile and is left as it is; using .venv-make\n"
    assert checkout.last == ".venv-make/bin/python scripts/search.py"
    assert checkout.make("search").stderr == ""
    assert checkout.make("clean").returncode == 0
    assert read_all(theirs) == before
    assert not (checkout.folder / ".venv-make").exists()


def test_environment_that_is_older_than_the_lock_is_kept_where_nothing_can_be_downloaded(checkout: Checkout) -> None:
    assert checkout.make("install").returncode == 0
    ours = checkout.folder / ".venv"
    (ours / "torch.py").write_text("installed")
    os.utime(checkout.folder / "requirements.lock")
    before = read_all(ours)
    assert checkout.make("search", pip=1).returncode != 0
    assert read_all(ours) == before
    assert checkout.make("search").returncode == 0
    assert checkout.last == ".venv/bin/python scripts/search.py"
    assert read_all(ours) == before


def test_environment_whose_first_installation_failed_is_still_ours(checkout: Checkout) -> None:
    assert checkout.make("search", pip=1).returncode != 0
    assert checkout.make("search").returncode == 0
    assert checkout.last == ".venv/bin/python scripts/search.py"
    assert checkout.make("clean").returncode == 0
    assert not (checkout.folder / ".venv").exists()


def test_cleaning_leaves_folders_that_nothing_here_makes(checkout: Checkout) -> None:
    for name in ("build", "dist", ".venv", ".venv-make"):
        (checkout.folder / name).mkdir()
        (checkout.folder / name / "notes").write_text("mine")
    before = read_all(checkout.folder)
    assert checkout.make("clean").returncode == 0
    assert read_all(checkout.folder) == before
