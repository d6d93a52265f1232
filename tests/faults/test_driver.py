"""The driver is killed, at any moment, or asked to end: what it had heard is kept, and the run goes on."""

import collections
import contextlib
import os
import pty
import random
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fault_runs import (
    ALONE,
    ROOT,
    Follow,
    Search,
    Undisturbed,
    begin,
    check_end,
    check_readable,
    check_resumes,
    check_run,
    count_events,
    measure_returns,
    name_arguments,
    note_fault,
    prepare,
    read_end,
    read_events,
    resume,
)

from tune_amp.results.records import load_confirmed
from tune_amp.results.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # under a minute each, on a machine of their own

KILLS = int(os.environ.get("TUNE_AMP_KILLS", "3"))
"""How often the driver is killed."""
SEED = int(os.environ.get("TUNE_AMP_KILL_SEED") or random.SystemRandom().randrange(10**6))
PHASES = {"search": 3.0, "checkpoint": 0.05, "export": 0.4, "confirmation": 1.0}
"""Where it is killed: at a random moment of so many seconds. Start-up is as long as that of the undisturbed run."""
CONFIRMED = (*ALONE, "--confirm-seeds", "3")


class Moment:
    """A random moment of a phase, at which a search is to be killed."""

    def __init__(self, phase: str, draw: random.Random, run: Path, *, start_up: float) -> None:
        self.phase = phase
        self._run, self._after = run, draw.random() * PHASES.get(phase, start_up)
        self._checkpoints = draw.randint(1, 3)
        self._known, self._confirmed = len(read_events(run)), _count_confirmed(run)
        self._begun: float | None = None

    def wait_for(self, search: Search) -> bool:
        """Wait; False where the search was over before."""
        while not search.is_over:
            if self._begun is None and self._has_begun():
                self._begun = search.began if self.phase == "start-up" else time.monotonic()
            if self._begun is not None and time.monotonic() - self._begun >= self._after:
                return True
            time.sleep(0.01)
        return False

    def _has_begun(self) -> bool:
        if self.phase == "start-up":
            return True
        if self.phase == "confirmation":
            return _count_confirmed(self._run) > self._confirmed
        kinds = [event["event"] for event in read_events(self._run)[self._known :]]
        if self.phase == "checkpoint":
            return kinds.count("checkpoint") >= self._checkpoints
        return {"search": "start", "export": "finish"}[self.phase] in kinds


def _count_confirmed(run: Path) -> int:
    return len(load_confirmed(run)) if RunFolder(run).confirm.exists() else 0


def choose_phases(kills: int, draw: random.Random) -> list[list[str]]:
    """The phases in which each of some runs is killed; what comes late in a run is at the end of each."""
    runs = []
    for first in range(0, kills, 6):
        early = ["start-up", "search", "checkpoint", "search"]
        draw.shuffle(early)
        phases = [*early, "export", "confirmation"]
        chosen = sorted(draw.sample(range(6), min(6, kills - first)))
        runs.append([phases[place] for place in chosen])
    return runs


def harass(
    folder: Path, phases: Sequence[str], draw: random.Random, follow: Follow, *, start_up: float
) -> dict[str, int]:
    """A run whose driver is killed in each of the phases, until nothing is left to do. Counts the kills by phase."""
    run = folder / "results" / "run"
    search = follow(begin(prepare(folder), *CONFIRMED))
    killed: dict[str, int] = collections.Counter()
    dead: list[Search] = []
    for phase in phases:
        if not Moment(phase, draw, run, start_up=start_up).wait_for(search):
            assert search.wait() == 0, search.stderr
            continue  # the phase did not come: with nothing left to confirm, say
        search.kill()
        killed[phase] += 1
        at, events = time.monotonic() - search.began, len(read_events(run))
        print(f"killed in {phase}, {at:.2f} s after the command, at event {events}")  # noqa: T201
        dead.append(search)
        check_readable(run)
        if events:
            search = follow(resume(folder))
        else:  # killed before it was a run at all
            shutil.rmtree(run, ignore_errors=True)
            search = follow(begin(folder, *CONFIRMED))
    assert search.wait() == 0, search.stderr
    for ended in (*dead, search):
        assert ended.find_left(90) == []  # agents of Ray's look for a minute for what has died with the driver
    return killed


@pytest.mark.long
@pytest.mark.timeout(300 + 120 * KILLS)
def test_driver_killed_at_random_moments(
    tmp_path: Path, undisturbed_run: Callable[[str], Path], undisturbed: Undisturbed, follow: Follow
) -> None:
    print(f"TUNE_AMP_KILL_SEED={SEED}")  # noqa: T201 - pytest shows it where the test fails
    events = read_events(undisturbed_run("confirmed"))
    start_up = next(event["at"] for event in events if event["event"] == "start")
    draw = random.Random(SEED)
    for number, phases in enumerate(choose_phases(KILLS, draw), start=1):
        folder = tmp_path / f"run {number}"
        killed = harass(folder, phases, draw, follow, start_up=start_up)
        run = folder / "results" / "run"
        assert read_end(run) == undisturbed("confirmed")
        count = check_run(run)
        returns = measure_returns(run)
        note_fault(
            "driver killed at random moments",
            "goes on with --resume",
            count,
            phases=killed,
            faults=sum(killed.values()),
            ended=0.0,
            resumed=statistics.median(returns) if returns else None,
            ranking_equal=True,
        )


def test_ctrl_c_ends_within_seconds_with_everything_exported(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path), *ALONE))
    search.wait_until(lambda: count_events(run, "report") >= 10)
    asked = time.monotonic()
    search.signal(signal.SIGINT)
    assert search.wait() == 130, search.stderr
    ended = time.monotonic() - asked
    assert check_run(run).repeated == 0
    assert (run / "best.parquet").exists()
    assert (run / "report.html").exists()
    assert search.find_left() == []
    check_resumes("Ctrl-C once", search, run, undisturbed("alone"), follow, ended=ended)


HANGS_AT_ONCE = """
def fault(self, images):
    if Net.steps == 20 and once("hangs"):
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
"""


@pytest.mark.long
def test_second_ctrl_c_leaves_at_once(tmp_path: Path, undisturbed: Undisturbed, follow: Follow) -> None:
    """Also where a worker does not answer."""
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path, HANGS_AT_ONCE), *ALONE))
    search.wait_until((tmp_path / "hangs").exists)
    search.signal(signal.SIGINT)
    time.sleep(0.3)
    asked = time.monotonic()
    search.signal(signal.SIGINT)
    assert search.wait(30) == 130, search.stderr
    ended = time.monotonic() - asked
    assert ended < 5
    check_readable(run)
    fault = "Ctrl-C twice, and a worker that hangs"
    check_resumes(fault, search, run, undisturbed("alone"), follow, ended=ended, outcome="leaves at once")


@pytest.mark.long
def test_terminal_that_closes_ends_the_search_with_everything_exported(tmp_path: Path, follow: Follow) -> None:
    """As where a connection breaks: all that is printed from then on is an error."""
    run = tmp_path / "results" / "run"
    ours, theirs = pty.openpty()
    terminal = os.ttyname(theirs)
    line = shlex.join([sys.executable, str(ROOT / "scripts" / "search.py"), *name_arguments(*ALONE)])
    # The shell, which leads a session of its own, opens the terminal, and so it is theirs.
    search = follow(Search(prepare(tmp_path), command=f"{line} <{terminal} >{terminal} 2>&1"))
    os.close(theirs)
    reader = threading.Thread(target=_read_all, args=(ours,), daemon=True)
    reader.start()
    search.wait_until(lambda: count_events(run, "report") >= 10)
    asked = time.monotonic()
    os.close(ours)
    assert search.wait() == 130
    seconds = time.monotonic() - asked
    count = check_run(run)
    assert count.repeated == 0
    assert (run / "report.html").exists()
    assert search.find_left() == []
    note_fault("its terminal closed", "ends, everything exported", count, ended=seconds)


def _read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):  # closed
        while os.read(terminal, 4096):
            pass


@pytest.mark.long
@pytest.mark.parametrize("moment", ["start-up", "confirmation"])
def test_sigterm_outside_of_the_search_ends_it_too(
    moment: str, tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path), *CONFIRMED))
    if moment == "start-up":
        search.wait_for_processes("raylet/raylet")
    else:
        search.wait_until(lambda: _count_confirmed(run) > 0)
    asked = time.monotonic()
    search.signal(signal.SIGTERM)
    assert search.wait() == 130, search.stderr
    ended = time.monotonic() - asked
    assert "Traceback" not in search.stderr
    assert search.find_left() == []
    if moment == "start-up":
        assert not run.exists()  # nothing was begun
        count = check_end(follow(begin(tmp_path, *CONFIRMED)), run, undisturbed("confirmed"))
        note_fault("SIGTERM in the start-up", "ends, nothing was begun", count, ended=ended, ranking_equal=True)
    else:
        known = load_confirmed(run)
        check_resumes("SIGTERM in the confirmation", search, run, undisturbed("confirmed"), follow, ended=ended)
        # Those on fresh seeds that were done are not done again.
        assert [kept for kept in known if kept not in load_confirmed(run)] == []
