"""Workers that are killed, hang or eat memory, and clocks that jump: the search goes on, and nothing is lost."""

import json
import os
import signal
from pathlib import Path

import pytest
from fault_runs import (
    ALONE,
    SIDE_BY_SIDE,
    Count,
    Ended,
    Follow,
    Search,
    Undisturbed,
    begin,
    check_end,
    check_run,
    count_events,
    hurry,
    note_fault,
    prepare,
    read_end,
    read_events,
)
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from tune_amp.results.records import load_trials, load_trials_file
from tune_amp.results.utilisation import utilisation
from tune_amp.trial.config import TrialStatus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # under a minute each, on a machine of their own


def check_ends_alone(search: Search, run: Path, expected: Ended, status: TrialStatus) -> Count:
    """One trial ended so; all others as in the undisturbed run."""
    assert search.wait() == 0, search.stderr
    trials = zip(read_end(run).trials, expected.trials, strict=True)
    assert [ours[1] for ours, theirs in trials if ours != theirs] == [status]
    count = check_run(run)
    assert search.find_left() == []
    return count


@pytest.mark.parametrize(
    ("slots", "arguments"),
    [("alone", ALONE), pytest.param("side by side", SIDE_BY_SIDE, marks=pytest.mark.long)],
)
def test_worker_killed_mid_epoch(
    slots: str, arguments: tuple[str, ...], tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path), *arguments))
    for reports in (3, 12):  # before its first checkpoint, most likely, and after
        search.wait_until(lambda reports=reports: count_events(run, "report") >= reports)  # type: ignore[misc]
        before = count_events(run, "report")
        os.kill(search.wait_for_processes("ray::AmpTrainable")[0], signal.SIGKILL)
        search.wait_until(lambda: "lost" in {event["event"] for event in read_events(run)})
        search.wait_until(lambda before=before: count_events(run, "report") > before + 1)  # type: ignore[misc]
    hurry(tmp_path)
    count = check_end(search, run, undisturbed(slots))
    assert search.stderr == ""
    assert count_events(run, "lost") == 2
    note_fault(f"worker killed mid-epoch, {slots}", "goes on", count, faults=2, ranking_equal=True)


KILLED_AT_CHECKPOINT = """
import zipfile, signal
from ray.train._internal import storage

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def state_dict(self, *arguments, **more):  # before anything is written
    if self.slow and once("died before"):
        die()
    return torch.nn.Linear.state_dict(self, *arguments, **more)

Net.state_dict = state_dict

write = pathlib.Path.write_bytes

def write_half(self, content):  # in the worker's own temporary folder
    if self.name == "trial.pt" and (HERE / "died before").exists() and once("died half way"):
        write(self, content[: len(content) // 2])
        die()
    return write(self, content)

pathlib.Path.write_bytes = write_half

copy = storage._pyarrow_fs_copy_files

def copy_half(source, destination, *arguments, **more):  # in the run folder, under its own name
    copy(source, destination, *arguments, **more)
    if (HERE / "died half way").exists() and "checkpoint_" in destination and once("died in the copy"):
        path = pathlib.Path(destination) / "trial.pt"
        write(path, path.read_bytes()[:1000])
        die()

storage._pyarrow_fs_copy_files = copy_half
"""


@pytest.mark.long
def test_worker_killed_in_the_middle_of_a_checkpoint(tmp_path: Path, undisturbed: Undisturbed, follow: Follow) -> None:
    """Three deaths, one more than a trial may cost: before the file, in it, and in its copy in the run folder."""
    run = tmp_path / "results" / "run"
    fault = KILLED_AT_CHECKPOINT.replace('"died half way").exists() and "ch', '"more than a trial").exists() and "ch')
    search = follow(begin(prepare(tmp_path, fault), *ALONE))
    search.wait_until((tmp_path / "died half way").exists)
    search.wait_until(lambda: count_events(run, "end") >= 1)
    (tmp_path / "more than a trial").touch()
    count = check_end(search, run, undisturbed("alone"))
    assert (tmp_path / "died in the copy").exists()
    assert search.stderr == ""
    assert count_events(run, "lost") == 3
    note_fault("worker killed in a checkpoint", "goes on", count, faults=3, ranking_equal=True)


DIES_BETWEEN_TRIALS = """
import signal
from tune_amp.cluster import trainable

def die_once(self, config):  # Tune's word that the next trial begins; the first came before
    if once("died between trials"):
        os.kill(os.getpid(), signal.SIGKILL)
    return trainable.AmpTrainable.reset_config(self, config)

def fault(self, images):
    frame = sys._getframe()
    while not isinstance(frame.f_locals.get("self"), trainable.AmpTrainable):
        frame = frame.f_back
    type(frame.f_locals["self"]).reset_config = die_once  # in Ray's copy of the class, which has its own methods
"""


@pytest.mark.long
def test_worker_killed_between_two_trials_costs_the_next_one_nothing(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    """Tune would queue that trial again, and then end it for good."""
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path, DIES_BETWEEN_TRIALS), *ALONE))
    count = check_end(search, run, undisturbed("alone"))
    assert (tmp_path / "died between trials").exists()
    assert count_events(run, "lost") == 1
    note_fault("worker killed between two trials", "goes on", count, ranking_equal=True)


HANGS = """
def fault(self, images):
    if Net.steps == 8 and once("hangs"):
        while True:
            time.sleep(1)
"""


@pytest.mark.long
def test_trial_that_hangs_is_ended_and_not_tried_again(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path, HANGS), *SIDE_BY_SIDE, "--trial-time-limit", "20"))
    count = check_ends_alone(search, run, undisturbed("side by side"), TrialStatus.FAILED)
    [failed] = [trial for trial in load_trials(run) if trial.status is TrialStatus.FAILED]
    assert failed.error is not None
    assert "--trial-time-limit" in failed.error
    assert len(failed.epochs) == 1
    assert failed.wall_seconds >= 20
    assert count_events(run, "start") == 6
    note_fault("a trial that hangs", "that trial fails, the others go on", count)


EATS_MEMORY = """
import resource

def fault(self, images):
    if Net.steps == 8 and once("eats"):
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
        try:
            eaten = []
            while True:
                eaten.append(bytearray(2**24))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
"""


@pytest.mark.long
def test_trial_that_eats_memory_ends_alone(tmp_path: Path, undisturbed: Undisturbed, follow: Follow) -> None:
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path, EATS_MEMORY), *SIDE_BY_SIDE))
    count = check_ends_alone(search, run, undisturbed("side by side"), TrialStatus.OUT_OF_MEMORY)
    assert count_events(run, "lost") == 0
    note_fault("a trial that eats memory", "that trial is out_of_memory, the others go on", count)


FILLS_THE_MACHINE = """
def fault(self, images):
    if Net.steps == 8 and any(once(f"eats {attempt}") for attempt in range(3)):
        eaten = []
        while True:
            eaten.append(b"1" * 2**26)  # written to, or it would take no memory
            time.sleep(0.02)
"""
OWN_GIB = 6.0
"""The search itself takes 2, and so may another that a test beside this one begins meanwhile. The trial gets as much
again as the machine holds: with less, the memory would be others'."""


@pytest.mark.long
def test_trial_whose_worker_the_memory_monitor_kills_each_time_ends_alone(tmp_path: Path, follow: Follow) -> None:
    """The machine counts as full a little above what it holds now: Ray's monitor kills the worker that fills it."""
    total, used = get_system_memory() / 2**30, get_used_memory() / 2**30
    if total - used < used + 2 * OWN_GIB:
        pytest.skip(f"{total - used:.1f} GiB of memory are free: too few for the search and what it wastes")
    threshold = (2 * used + OWN_GIB) / total
    monitor = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    run = tmp_path / "results" / "run"
    search = follow(begin(prepare(tmp_path, FILLS_THE_MACHINE), *ALONE, environment=monitor))
    assert search.wait() == 0, search.stderr
    killed, *others = load_trials(run)
    assert killed.status is TrialStatus.OUT_OF_MEMORY
    assert killed.error is not None
    assert "low on memory" in killed.error
    assert len(killed.epochs) == 1
    assert {trial.status for trial in others} <= {TrialStatus.COMPLETED, TrialStatus.STOPPED}
    assert len(others) == 5
    count = check_run(run)
    assert count_events(run, "lost") == 3  # it was tried again twice, as after any death of its worker
    assert search.find_left() == []
    note_fault(
        "a trial that fills the machine, whose worker Ray's memory monitor kills",
        "that trial is out_of_memory, the others go on",
        count,
        faults=3,
    )


JUMPING_CLOCK = """
import time
right = time.time

def jumping():  # every second, for all processes at the same moment: on, an hour back, a day ahead
    return right() + (0.0, -3600.0, 86400.0)[int(time.monotonic()) % 3]

time.time = jumping
"""


@pytest.mark.long
def test_clocks_that_jump_change_no_result_and_no_duration(
    tmp_path: Path, undisturbed: Undisturbed, follow: Follow
) -> None:
    run = tmp_path / "results" / "run"
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)  # of every Python that is started
    path = os.pathsep.join([str(tmp_path / "clock"), str(Path(__file__).resolve().parents[2])])
    search = follow(begin(prepare(tmp_path), *ALONE, "--json", environment={"PYTHONPATH": path}))
    count = check_end(search, run, undisturbed("alone"))
    slot_time, trials = load_trials_file(run).slot_time, load_trials(run)
    assert slot_time is not None
    assert 0 < slot_time.wall_seconds < 600
    seconds = utilisation(trials, slot_time)
    assert sum(seconds.values()) == pytest.approx(slot_time.slots * slot_time.wall_seconds)
    assert all(value >= 0 for value in seconds.values())
    for trial in trials:
        assert trial.last is not None
        assert 0 < trial.last.train_seconds <= trial.wall_seconds <= slot_time.wall_seconds
        assert 0 <= trial.setup_seconds <= trial.wall_seconds
    moments = [event["at"] for event in read_events(run)[1:]]
    assert moments == sorted(moments)
    assert json.loads(search.stdout.splitlines()[-1])["event"] == "result"
    note_fault("clocks that jump", "goes on", count, ranking_equal=True)
