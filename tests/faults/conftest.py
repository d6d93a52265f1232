"""Runs that nothing disturbed, for all files here to compare with: each is made once, whichever process needs it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_runs import (
    ALONE,
    SIDE_BY_SIDE,
    Ended,
    Follow,
    Search,
    Undisturbed,
    begin,
    check_run,
    hurry,
    prepare,
    read_end,
)

from tune_amp.results.run_folder import RunFolder

RUNS = {"alone": ALONE, "side by side": SIDE_BY_SIDE, "confirmed": (*ALONE, "--confirm-seeds", "3")}


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undisturbed run, by a name of ``RUNS``."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str) -> Path:
        folder = shared / f"undisturbed {name}"
        run = folder / "results" / "run"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other process may be making it
            if not RunFolder(run).journal.exists():
                hurry(prepare(folder))
                search = begin(folder, *RUNS[name])
                assert search.wait() == 0, search.stderr
                assert search.find_left() == []
                assert check_run(run).repeated == 0
        return run

    return make


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: Callable[[str], Path]) -> Undisturbed:
    """The end of an undisturbed run, by a name of ``RUNS``."""

    def read(name: str) -> Ended:
        return read_end(undisturbed_run(name))

    return read


@pytest.fixture
def follow() -> Iterator[Follow]:
    """Remembers searches, of which nothing is left when the test is over, whatever it found."""
    searches: list[Search] = []

    def remember(search: Search) -> Search:
        searches.append(search)
        return search

    yield remember
    for search in searches:
        search.destroy()
