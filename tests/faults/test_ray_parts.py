"""Ray's own processes are killed: the search ends within a bounded time, or goes on where it can."""

import os
import signal
import time
from pathlib import Path

import pytest
from fault_runs import (
    ALONE,
    Follow,
    Undisturbed,
    begin,
    check_end,
    check_resumes,
    check_run,
    count_events,
    note_fault,
    prepare,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # under a minute each, on a machine of their own

VITAL = {
    "raylet": "/raylet/raylet",
    "GCS": "gcs_server",
    "agent of the dashboard": "dashboard/agent.py",
}


@pytest.mark.long
@pytest.mark.parametrize("part", [*VITAL, "GCS, as the dashboard starts,"])
def test_search_whose_ray_dies_ends_and_can_be_resumed(
    part: str, tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    is_early = part not in VITAL
    search = follow(begin(prepare(tmp_path), *ALONE, *(("--dashboard", "on") if is_early else ())))
    if is_early:
        search.wait_for_processes("dashboard/dashboard.py")
    else:
        search.wait_until(lambda: count_events(run, "report") >= 6)
    [pid] = search.wait_for_processes(VITAL["GCS" if is_early else part])
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert search.wait() == 130, search.stderr
    ended = time.monotonic() - killed
    assert "has died" in search.stderr
    assert check_run(run).repeated == 0
    check_resumes(f"Ray's {part} killed", search, run, undisturbed("alone"), follow, ended=ended)
    assert search.find_left(90) == []  # two agents of Ray's look for their GCS for a minute


@pytest.mark.long
def test_search_goes_on_without_its_dashboard(tmp_path: Path, undisturbed: Undisturbed, follow: Follow) -> None:
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path), *ALONE, "--dashboard", "on"))
    search.wait_until(lambda: count_events(run, "report") >= 3)
    [pid] = search.wait_for_processes("dashboard/dashboard.py")
    os.kill(pid, signal.SIGKILL)
    count = check_end(search, run, undisturbed("alone"))
    note_fault("dashboard killed", "goes on", count, faults=1, ranking_equal=True)
