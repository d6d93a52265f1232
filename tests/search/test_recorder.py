import contextlib
import dataclasses
import datetime
import math
import pickle
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from past_runs import STORAGE, beginning
from records import make_epoch

from tune_amp.cluster.failures import find_cause, find_status
from tune_amp.cluster.trainable import REPORT, failure_report, progress_report, read_report
from tune_amp.results.journal import Journal, read_journal
from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.records import SlotTime, TrialRecord, load_trials, load_trials_file
from tune_amp.results.run_folder import RunFolder
from tune_amp.search import recorder as recorder_module
from tune_amp.search.history import RunHistory, _read_history
from tune_amp.search.recorder import TrialRecorder
from tune_amp.trial.config import TrialConfig, TrialStatus

CONFIG = TrialConfig(precision="fp16", lr=0.01, batch_size=256)
WORKER = {
    "device": "NVIDIA H200",
    "num_threads": 3,
    "setup_seconds": 0.25,
    "checkpoint_seconds": 0.5,
}


class FakeTrial:
    """What a recorder reads of ray.tune.Trial."""

    def __init__(self, trial_id: str, **config: Any) -> None:
        self.trial_id = trial_id
        self.settings = dataclasses.replace(CONFIG, **config)
        self.last_result: dict[str, Any] = {}
        self.error_file: str | None = None
        kept: dict[str, Any] = {"metric_analysis": {"epoch": {}}, "metric_n_steps": {"epoch": {}}}
        self.run_metadata = types.SimpleNamespace(**kept, last_result=None)
        self.temporary_state = types.SimpleNamespace(ray_actor="Actor(AmpTrainable, 1)")

    def __str__(self) -> str:
        return f"name-of-{self.trial_id}"


class Clock:
    """Stands for the recorder's two clocks."""

    now = 1000.0
    date = 1_800_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.date


class Watcher(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[SearchProgress, TrialRecord | None]] = []
        self.looks: list[Sequence[TrialRecord]] = []

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        self.seen.append((progress, ended))


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder_module, "time", clock)
    return clock


@pytest.fixture
def faults() -> list[str]:
    return []


MakeRecorder = Callable[[], TrialRecorder]


@pytest.fixture
def make_recorder(tmp_path: Path, watcher: Watcher, clock: Clock, faults: list[str]) -> Iterator[MakeRecorder]:
    """A recorder for each time that the search begins or goes on; the journal is that of the run."""
    with contextlib.ExitStack() as stack:

        def make() -> TrialRecorder:
            stack.close()  # the process before is dead, and its lock is gone
            progress = SearchProgress(
                run="run",
                model="simple_net",
                dataset="digits",
                objectives=("val_accuracy",),
                num_samples=4,
                time_budget=None,
                slots=2,
                started=clock.now,
            )
            return TrialRecorder(
                tmp_path,
                read_history(stack.enter_context(Journal(RunFolder(tmp_path).journal))),
                progress,
                watcher,
                storage_root="/storage",
                begin=clock.now,
                explain_death=find_cause,
                on_fault=faults.append,
                on_failure=watcher.looks.append,
            )

        yield make


@pytest.fixture
def recorder(make_recorder: MakeRecorder) -> TrialRecorder:
    recorder = make_recorder()
    recorder.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    return recorder


def start(recorder: TrialRecorder, trial: FakeTrial) -> None:
    """The trial is submitted, unless it was, and gets a worker."""
    recorder.add_trial(trial, 0, trial.settings)
    recorder.on_trial_start(0, [], trial)


def report(recorder: TrialRecorder, trial: FakeTrial, result: dict[str, Any], **changes: Any) -> None:
    told = {**result, **WORKER, **changes}
    trial.last_result = {"trial_id": trial.trial_id, **told, REPORT: read_report(told)}
    recorder.on_trial_result(0, [], trial, trial.last_result)
    trial.run_metadata.last_result = trial.last_result


def report_epoch(
    recorder: TrialRecorder, trial: FakeTrial, epoch: int, status: str = "running", **changes: Any
) -> None:
    report(recorder, trial, progress_report(make_epoch(epoch, **changes), status))


def finish(recorder: TrialRecorder, trial: FakeTrial) -> None:
    recorder.on_trial_complete(0, [], trial)


def only(recorder: TrialRecorder) -> TrialRecord:
    [record] = recorder.trials
    return record


def test_trial_is_recorded_from_its_start_and_interrupted_until_it_ends(recorder: TrialRecorder) -> None:
    trial = FakeTrial("7422e802", lr=0.02)
    start(recorder, trial)
    record = only(recorder)
    assert (record.trial_id, record.trial_name) == ("7422e802", "name-of-7422e802")
    assert record.status is TrialStatus.INTERRUPTED
    assert record.config == dataclasses.replace(CONFIG, lr=0.02)
    assert record.epochs == ()
    report_epoch(recorder, trial, 1)
    assert only(recorder).status is TrialStatus.INTERRUPTED


def test_every_epoch_is_kept_exactly_as_reported(recorder: TrialRecorder, clock: Clock) -> None:
    trial = FakeTrial("a")
    clock.now += 30
    start(recorder, trial)
    clock.date -= 3600  # somebody sets the clock
    clock.now += 2.5
    for epoch in (1, 2, 3):
        report_epoch(recorder, trial, epoch)
    record = only(recorder)
    assert record.epochs == (make_epoch(1), make_epoch(2), make_epoch(3))
    assert record.started == datetime.datetime.fromtimestamp(Clock.date, datetime.UTC)
    assert (record.wall_seconds, record.device, record.num_threads) == (2.5, "NVIDIA H200", 3)
    assert (record.setup_seconds, record.checkpoint_seconds, record.worker) == (0.25, 0.5, 1)
    assert record.error is None


def test_result_stays_as_it_is_until_its_trial_has_ended_and_is_recorded(recorder: TrialRecorder) -> None:
    """Tune keeps two queues and seven figures of every number, for as long as the search lasts."""
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1, "completed", val_accuracy=0.75)
    assert only(recorder).epochs == (make_epoch(1, val_accuracy=0.75),)
    reported = dict(trial.last_result)
    assert REPORT in reported
    finish(recorder, trial)
    del reported[REPORT]
    assert trial.last_result == reported
    assert find_status(trial.last_result, error=False) is TrialStatus.COMPLETED
    assert (trial.run_metadata.metric_analysis, trial.run_metadata.metric_n_steps) == ({}, {})


def accuracies(recorder: TrialRecorder) -> list[tuple[int, float | None]]:
    return [(epoch.epoch, epoch.val_accuracy) for epoch in only(recorder).epochs]


def test_epochs_reported_anew_take_the_place_of_their_first_report_and_none_vanishes(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    for epoch in (1, 2, 3):
        report_epoch(recorder, trial, epoch, val_accuracy=0.1)
    start(recorder, trial)  # its worker died; epoch 1 was the last in its checkpoint
    report_epoch(recorder, trial, 2, val_accuracy=0.9)
    assert accuracies(recorder) == [(1, 0.1), (2, 0.9), (3, 0.1)]
    report_epoch(recorder, trial, 3, val_accuracy=0.8)
    assert accuracies(recorder) == [(1, 0.1), (2, 0.9), (3, 0.8)]


def test_trial_that_diverges_when_tried_again_has_no_epochs_after_that(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    for epoch in (1, 2, 3):
        report_epoch(recorder, trial, epoch, val_accuracy=0.5)
    start(recorder, trial)
    report_epoch(recorder, trial, 2, "diverged", val_accuracy=0.1)
    assert accuracies(recorder) == [(1, 0.5), (2, 0.1)]


def test_trial_started_again_keeps_what_it_reported(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    start(recorder, trial)
    assert only(recorder).epochs == (make_epoch(1),)


def test_time_of_a_trial_started_again_counts_from_its_first_start(recorder: TrialRecorder, clock: Clock) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    clock.now += 10
    clock.date += 10
    start(recorder, trial)
    clock.now += 1
    report_epoch(recorder, trial, 2)
    assert only(recorder).started == datetime.datetime.fromtimestamp(Clock.date, datetime.UTC)
    assert only(recorder).wall_seconds == 11.0


@pytest.mark.parametrize(
    ("status", "changes", "expected"),
    [
        ("completed", {}, "completed"),
        ("diverged", {}, "diverged"),
        ("running", {"done": True}, "stopped"),
        ("running", {}, "interrupted"),
    ],
)
def test_status_is_read_from_the_last_report(
    recorder: TrialRecorder, status: str, changes: dict[str, Any], expected: str
) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report(recorder, trial, progress_report(make_epoch(1), status), **changes)
    finish(recorder, trial)
    assert only(recorder).status is TrialStatus(expected)


def test_failure_keeps_the_epochs_before_it_and_its_reason(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    report(recorder, trial, failure_report(MemoryError("none\nleft")))
    finish(recorder, trial)
    record = only(recorder)
    assert record.status is TrialStatus.OUT_OF_MEMORY
    assert record.error == "MemoryError: none left"
    assert record.epochs == (make_epoch(1),)


def test_failure_by_the_settings_fault_is_recorded_as_that(recorder: TrialRecorder, tmp_path: Path) -> None:
    for name, fault in (("a", True), ("b", False)):
        trial = FakeTrial(name)
        start(recorder, trial)
        report(recorder, trial, failure_report(RuntimeError("no kernel")), config_fault=fault)
        finish(recorder, trial)
    assert [trial.config_fault for trial in recorder.trials] == [True, False]
    recorder.write()
    assert load_trials(tmp_path) == recorder.trials


def test_death_of_a_worker_is_a_failure_with_its_reason_on_one_line(recorder: TrialRecorder, tmp_path: Path) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    error_file = tmp_path / "error.txt"
    error_file.write_text("Failure # 3\nTraceback:\n  line 1\n\x1b[36mOSError\x1b[0m: The actor died\n\n")
    trial.error_file = str(error_file)
    recorder.on_trial_error(0, [], trial)
    record = only(recorder)
    assert (record.status, record.error) == (TrialStatus.FAILED, "OSError: The actor died")
    assert record.epochs == (make_epoch(1),)


@pytest.mark.parametrize("dies", [False, True])
def test_trial_that_ends_before_it_got_a_worker_is_recorded(
    recorder: TrialRecorder, watcher: Watcher, dies: bool
) -> None:
    trial = FakeTrial("a")
    recorder.add_trial(trial, 0, trial.settings)
    assert recorder.trials == []
    if dies:
        recorder.on_trial_error(0, [], trial)
    else:
        finish(recorder, trial)
    assert only(recorder).status is (TrialStatus.FAILED if dies else TrialStatus.INTERRUPTED)
    assert watcher.seen[-1][1] == only(recorder)


def test_trials_keep_the_order_of_their_submission_however_their_workers_start(recorder: TrialRecorder) -> None:
    """Ties in the ranking are broken by it."""
    c, a, b = trials = [FakeTrial(trial_id) for trial_id in ("c", "a", "b")]
    for number, trial in enumerate(trials):
        recorder.add_trial(trial, number, trial.settings)
    for trial in (a, b, c, c):  # the last is tried again
        start(recorder, trial)
    for trial in (b, c, a):
        report_epoch(recorder, trial, 1, "completed")
        finish(recorder, trial)
    assert [record.trial_id for record in recorder.trials] == ["c", "a", "b"]


# Who watches


def test_observer_is_told_of_every_start_report_and_end(recorder: TrialRecorder, watcher: Watcher) -> None:
    first, second = FakeTrial("first"), FakeTrial("second")
    start(recorder, first)
    start(recorder, second)
    report_epoch(recorder, first, 1, "completed")
    finish(recorder, first)
    running = [progress.running for progress, _ in watcher.seen]
    assert running == [{"first"}, {"first", "second"}, {"first", "second"}, {"second"}]
    assert [ended and ended.trial_id for _, ended in watcher.seen] == [None, None, None, "first"]
    assert [progress.count_ended() for progress, _ in watcher.seen] == [0, 0, 0, 1]
    assert [len(progress.trials) for progress, _ in watcher.seen] == [1, 2, 2, 2]
    last = watcher.seen[-1][0]
    assert (last.run, last.num_samples, last.trials[0].status) == ("run", 4, TrialStatus.COMPLETED)


def test_each_failure_is_followed_by_a_look_at_all_trials(recorder: TrialRecorder, watcher: Watcher) -> None:
    _, full, failed = trials = [FakeTrial(name) for name in ("runs", "full", "fails")]
    for trial in trials:
        start(recorder, trial)
    for trial, error in ((full, MemoryError()), (failed, ValueError("no"))):
        assert watcher.looks == []
        report(recorder, trial, failure_report(error))
        finish(recorder, trial)
    [look] = watcher.looks
    assert [str(trial.status) for trial in look] == ["interrupted", "out_of_memory", "failed"]


def test_progress_once_shown_does_not_change(recorder: TrialRecorder, watcher: Watcher) -> None:
    """A live display draws in a thread of its own."""
    trial = FakeTrial("a")
    start(recorder, trial)
    before = watcher.seen[0][0]
    report_epoch(recorder, trial, 1)
    start(recorder, FakeTrial("b"))
    [shown] = before.trials
    assert shown.epochs == ()
    assert before.running == frozenset({"a"})


def test_recorder_is_pickled_though_nobody_reads_it(recorder: TrialRecorder) -> None:
    """By Tune, with all callbacks: its journal is an open file, and its observer may be a terminal."""
    start(recorder, FakeTrial("a"))
    assert vars(pickle.loads(pickle.dumps(recorder))) == {}


# Files


def test_files_are_written_when_a_trial_ends_but_not_more_often_than_every_few_seconds(
    recorder: TrialRecorder, tmp_path: Path, clock: Clock
) -> None:
    def end_trial(trial_id: str) -> int:
        trial = FakeTrial(trial_id)
        start(recorder, trial)
        report_epoch(recorder, trial, 1, "completed")
        finish(recorder, trial)
        return count_written()

    def count_written() -> int:
        recorder.on_step_end(0, [])
        return len(load_trials(tmp_path)) if (tmp_path / "trials.parquet").exists() else 0

    clock.now += recorder_module.WRITE_EVERY_SECONDS - 0.1
    assert end_trial("a") == 0
    clock.now += 0.2
    assert end_trial("b") == 2
    clock.now += recorder_module.WRITE_EVERY_SECONDS - 0.1
    assert end_trial("c") == 2
    clock.now += 0.2
    assert count_written() == 3  # though nothing more has happened
    clock.now += recorder_module.WRITE_EVERY_SECONDS + 0.1
    start(recorder, FakeTrial("d"))
    assert count_written() == 3  # a start writes nothing
    assert end_trial("e") == 5
    recorder._write_seconds = 1.0  # as on a slow disk
    clock.now += recorder_module.WRITE_EVERY_SECONDS + 0.1
    assert end_trial("f") == 5
    clock.now += recorder_module.PAUSE_PER_WRITE
    assert count_written() == 6


def test_written_files_hold_what_was_reported(recorder: TrialRecorder, tmp_path: Path) -> None:
    done, open_trial, dead = FakeTrial("1e5"), FakeTrial("16076160"), FakeTrial("dead")
    start(recorder, done)
    start(recorder, open_trial)
    recorder.add_trial(dead, 2, dead.settings)
    report_epoch(recorder, done, 1)
    report_epoch(recorder, done, 2, "diverged", train_loss=math.inf, val_loss=math.inf)
    finish(recorder, done)
    recorder.on_trial_error(0, [], dead)
    recorder.write()
    assert load_trials(tmp_path) == recorder.trials


def test_death_without_a_reason_says_so(recorder: TrialRecorder, tmp_path: Path) -> None:
    trial = FakeTrial("a")
    trial.error_file = str(tmp_path / "never-written.txt")
    start(recorder, trial)
    recorder.on_trial_error(0, [], trial)
    assert only(recorder).error == "its worker died, and Ray left no reason"


def test_what_still_runs_at_the_end_was_interrupted_and_is_told(
    recorder: TrialRecorder, watcher: Watcher, tmp_path: Path, clock: Clock
) -> None:
    ended, running = FakeTrial("a"), FakeTrial("b")
    start(recorder, ended)
    start(recorder, running)
    clock.now += 1
    report_epoch(recorder, ended, 1, "completed")
    finish(recorder, ended)
    recorder.finish()
    progress, told = watcher.seen[-1]
    assert told is not None
    assert (told.trial_id, told.status) == ("b", TrialStatus.INTERRUPTED)
    assert told.wall_seconds > 0
    assert progress.running == frozenset()
    assert [trial.trial_id for trial in load_trials(tmp_path)] == ["a", "b"]


def test_reports_are_written_while_trials_run(
    recorder: TrialRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "WRITE_EVERY_SECONDS", 0.0)
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    recorder.on_step_end(0, [trial])
    [written] = load_trials(tmp_path)
    assert (written.status, written.epochs) == (TrialStatus.INTERRUPTED, (make_epoch(1),))


# Slot time


def test_slot_time_is_known_when_the_search_is_over_and_written_with_it(
    recorder: TrialRecorder, clock: Clock, tmp_path: Path
) -> None:
    start(recorder, FakeTrial("a"))
    clock.now += 3
    assert recorder.slot_time is None
    recorder.write()
    assert load_trials_file(tmp_path).slot_time is None
    recorder.finish()
    assert recorder.slot_time == load_trials_file(tmp_path).slot_time == SlotTime(slots=2, wall_seconds=3.0)


def test_slots_of_nodes_that_joined_count(recorder: TrialRecorder) -> None:
    """Three trials run at a time. The one whose worker dies frees its slot; those that follow find a free one."""
    first, second, third, fourth, fifth = (FakeTrial(name) for name in "abcde")
    for trial in (first, second, third):
        start(recorder, trial)
    recorder.on_trial_recover(0, [], first)
    start(recorder, fourth)
    finish(recorder, second)
    start(recorder, fifth)
    recorder.finish()
    assert recorder.slot_time is not None
    assert recorder.slot_time.slots == 3


def test_workers_are_numbered_as_they_come(recorder: TrialRecorder) -> None:
    trial, other = FakeTrial("a"), FakeTrial("b")
    start(recorder, trial)
    recorder.on_trial_recover(0, [], trial)
    other.temporary_state.ray_actor = trial.temporary_state.ray_actor = "Actor(AmpTrainable, 2)"
    start(recorder, trial)
    assert only(recorder).worker is None  # it has not reported
    report_epoch(recorder, trial, 1, "completed")
    finish(recorder, trial)
    start(recorder, other)
    report_epoch(recorder, other, 1)
    assert [record.worker for record in recorder.trials] == [2, 2]


# The journal


def test_every_event_is_in_the_journal_before_anyone_is_told(
    recorder: TrialRecorder, watcher: Watcher, tmp_path: Path
) -> None:
    class Reader(Observer):
        def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
            seen.append(read_journal(RunFolder(tmp_path).journal)[-1]["event"])

    seen: list[str] = []
    recorder._observer = Reader()
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1, "completed")
    finish(recorder, trial)
    assert seen == ["start", "report", "end"]
    events = [event["event"] for event in read_journal(RunFolder(tmp_path).journal)]
    assert events == ["run", "session", "trial", *seen]


def test_checkpoints_are_noted_by_their_place_in_the_storage(recorder: TrialRecorder, tmp_path: Path) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    recorder.on_checkpoint(0, [], trial, types.SimpleNamespace(path="/storage/ray/a/checkpoint_000000"))
    assert read_journal(RunFolder(tmp_path).journal)[-1]["path"] == "ray/a/checkpoint_000000"


def test_checkpoints_may_go_once_the_journal_says_that_their_trial_is_over(
    make_recorder: MakeRecorder, tmp_path: Path
) -> None:
    recorder = make_recorder()

    def look(name: str) -> None:
        seen.append((name, read_journal(RunFolder(tmp_path).journal)[-1]["event"]))

    seen: list[tuple[str, str]] = []
    recorder._on_end = look
    completed, dies, cut = FakeTrial("a"), FakeTrial("b"), FakeTrial("c")
    for trial in (completed, dies, cut):
        start(recorder, trial)
    report_epoch(recorder, completed, 1, "completed")
    recorder.on_trial_recover(0, [], dies)
    assert seen == []
    finish(recorder, completed)
    recorder.on_trial_error(0, [], dies)
    finish(recorder, cut)  # as Tune ends what still runs: it may go on
    recorder.record_end("c", TrialStatus.STOPPED)
    recorder._is_broken = True
    recorder.on_trial_error(0, [], cut)
    assert seen == [("name-of-a", "end"), ("name-of-b", "end"), ("name-of-c", "end")]


def test_what_cannot_be_written_does_not_count_and_neither_does_anything_after_it(
    recorder: TrialRecorder, faults: list[str], tmp_path: Path, watcher: Watcher
) -> None:
    """A gap in the epochs of a trial would never be filled again."""
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    full = FullDisk(recorder._history.journal)
    recorder._history.journal = full  # type: ignore[assignment]
    told = len(watcher.seen)
    report_epoch(recorder, trial, 2)
    full.is_full = False
    report_epoch(recorder, trial, 3)
    assert only(recorder).epochs == (make_epoch(1),)
    assert len(watcher.seen) == told
    assert faults == ["OSError: [Errno 28] No space left on device"]


class FullDisk:
    """A journal on a disk without room."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.is_full = True

    def append(self, event: dict[str, Any]) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self._journal.append(event)


# A search that goes on


def test_recorder_that_goes_on_knows_what_the_one_before_it_knew(
    make_recorder: MakeRecorder, clock: Clock, tmp_path: Path
) -> None:
    before = make_recorder()
    before.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    done, dead, open_trial, waiting = (FakeTrial(name) for name in ("done", "dead", "open", "waiting"))
    clock.now += 7
    for number, trial in enumerate((done, dead, open_trial, waiting)):
        before.add_trial(trial, number, trial.settings)
    for trial in (open_trial, done, dead):
        before.on_trial_start(0, [], trial)
        clock.now += 1
        report_epoch(before, trial, 1)
    report(before, done, failure_report(ValueError("no")))
    finish(before, done)
    before.on_trial_error(0, [], dead)
    clock.now += 2
    report_epoch(before, open_trial, 2, loss_scale_values=(math.inf, 2.0), val_loss=math.nan)

    after = make_recorder()
    assert repr(after.trials) == repr(before.trials)  # repr: NaN is not equal to itself
    assert [trial.trial_id for trial in after.trials] == ["done", "dead", "open"]


def test_trial_that_goes_on_keeps_its_epochs_and_its_time_but_not_that_in_between(
    make_recorder: MakeRecorder, clock: Clock, tmp_path: Path, watcher: Watcher
) -> None:
    before = make_recorder()
    before.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    trial = FakeTrial("a")
    clock.now += 7
    start(before, trial)
    clock.now += 3
    report_epoch(before, trial, 1)

    clock.now += 1000
    after = make_recorder()
    after.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    clock.now += 20  # Ray starts
    trial.temporary_state.ray_actor = "Actor(AmpTrainable, 2)"
    start(after, trial)
    assert watcher.seen[-1][0].started == 2010.0 - 10.0
    clock.now += 4
    report_epoch(after, trial, 2, "completed")
    finish(after, trial)
    after.finish()
    assert [epoch.epoch for epoch in only(after).epochs] == [1, 2]
    assert only(after).wall_seconds == 3 + 4
    assert only(after).worker == 2
    assert after.slot_time == SlotTime(slots=2, wall_seconds=10 + 24)


def test_a_search_that_was_cut_off_twice_is_told_as_one(
    make_recorder: MakeRecorder, clock: Clock, tmp_path: Path
) -> None:
    trial = FakeTrial("a")
    for epoch in (1, 2, 3):
        trial.temporary_state.ray_actor = f"Actor(AmpTrainable, {epoch})"
        recorder = make_recorder()
        recorder.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
        clock.now += 5
        start(recorder, trial)
        clock.now += 1
        report_epoch(recorder, trial, epoch, "completed" if epoch == 3 else "running")
    finish(recorder, trial)
    recorder.finish()
    assert [epoch.epoch for epoch in load_trials(tmp_path)[0].epochs] == [1, 2, 3]
    assert only(recorder).wall_seconds == 3
    assert recorder.slot_time == SlotTime(slots=2, wall_seconds=18)


def test_a_trial_that_was_cut_off_has_not_ended_until_it_resumes_and_ends(
    make_recorder: MakeRecorder, watcher: Watcher
) -> None:
    first, second = FakeTrial("a"), FakeTrial("b")
    recorder = make_recorder()
    recorder.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    for trial in (first, second):
        start(recorder, trial)
    recorder.finish()
    assert watcher.seen[-1][0].count_ended() == 2  # interrupted, for this session
    recorder = make_recorder()
    recorder.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    start(recorder, first)
    assert [trial.trial_id for trial in watcher.seen[-1][0].trials] == ["a"]
    report_epoch(recorder, first, 1, "completed")
    finish(recorder, first)
    assert watcher.seen[-1][0].count_ended() == 1
    recorder.finish()
    assert watcher.seen[-1][0].count_ended() == 1
    recorder = make_recorder()
    recorder.open_session(slots=2, num_samples=4, arguments={}, storage=STORAGE)
    recorder.record_end("b", TrialStatus.COMPLETED)  # its last report came before the cut
    report_epoch(recorder, first, 1)
    assert watcher.seen[-1][0].count_ended() == 2


def read_history(journal: Journal) -> RunHistory:
    """The history of the run whose journal this is, which begins where it is empty."""
    path = journal._path
    if not path.read_bytes():
        journal.append(beginning())
    return _read_history(path, journal)
