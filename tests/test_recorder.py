import dataclasses
import datetime
import math
import pickle
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from records import PROVENANCE, make_epoch

from tune_amp import recorder as recorder_module
from tune_amp.config import TrialConfig, TrialStatus
from tune_amp.recorder import SearchProgress, TrialRecorder
from tune_amp.results import TrialRecord, load_ledger, load_trials
from tune_amp.searcher import find_status
from tune_amp.trainable import failure_report, progress_report

CONFIG = TrialConfig(precision="fp16", lr=0.01, batch_size=256)
STARTED = 1_800_000_000.0
WORKER = {
    "started": STARTED,
    "wall_seconds": 2.5,
    "device": "NVIDIA H200",
    "num_threads": 3,
    "setup_seconds": 0.25,
    "checkpoint_seconds": 0.5,
    "spent": {},
}


class FakeTrial:
    """What a recorder reads of ray.tune.Trial."""

    def __init__(self, trial_id: str, **config: Any) -> None:
        self.trial_id = trial_id
        self.config = vars(dataclasses.replace(CONFIG, **config))
        self.last_result: dict[str, Any] = {}
        self.error_file: str | None = None
        self.run_metadata = types.SimpleNamespace(metric_analysis={"epoch": {}}, metric_n_steps={"epoch": {}})
        self.temporary_state = types.SimpleNamespace(ray_actor="Actor(AmpTrainable, 1)")

    def __str__(self) -> str:
        return f"name-of-{self.trial_id}"


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[SearchProgress, TrialRecord | None]] = []

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        self.seen.append((progress, ended))


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def recorder(tmp_path: Path, watcher: Watcher) -> TrialRecorder:
    progress = SearchProgress(
        run="run",
        model="simple_net",
        dataset="digits",
        objectives=("val_accuracy",),
        num_samples=4,
        time_budget=None,
        started=time.monotonic(),
    )
    return TrialRecorder(tmp_path, PROVENANCE, progress, watcher, slots=2, begin=time.monotonic())


def start(recorder: TrialRecorder, trial: FakeTrial, submitted: Sequence[FakeTrial] = ()) -> None:
    recorder.on_trial_start(0, list(submitted), trial)


def report(recorder: TrialRecorder, trial: FakeTrial, result: dict[str, Any], **changes: Any) -> None:
    trial.last_result = {"trial_id": trial.trial_id, **result, **WORKER, **changes}
    recorder.on_trial_result(0, [], trial, trial.last_result)


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


def test_every_epoch_is_kept_exactly_as_reported(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    for epoch in (1, 2, 3):
        report_epoch(recorder, trial, epoch)
    record = only(recorder)
    assert record.epochs == (make_epoch(1), make_epoch(2), make_epoch(3))
    assert record.started == datetime.datetime.fromtimestamp(STARTED, datetime.UTC)
    assert (record.wall_seconds, record.device, record.num_threads) == (2.5, "NVIDIA H200", 3)
    assert (record.setup_seconds, record.checkpoint_seconds, record.worker) == (0.25, 0.5, 1)
    assert record.error is None


def test_tune_is_left_with_what_it_needs_of_a_report(recorder: TrialRecorder) -> None:
    """It keeps two queues and seven figures of every number, for as long as the search lasts."""
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1, "completed", val_accuracy=0.75)
    assert only(recorder).epochs == (make_epoch(1, val_accuracy=0.75),)
    left = trial.last_result
    assert find_status(left, error=False) is TrialStatus.COMPLETED
    assert {name: left[name] for name in ("val_accuracy", "epoch", "done")} == {
        "val_accuracy": 0.75,
        "epoch": 1,
        "done": True,
    }
    assert {"config", "spent", "steps", "loss_scale_values"} & left.keys() == set()
    assert sum(isinstance(value, int | float) for value in left.values()) <= 8
    finish(recorder, trial)
    assert (trial.run_metadata.metric_analysis, trial.run_metadata.metric_n_steps) == ({}, {})


def test_epochs_reported_anew_by_a_retried_trial_replace_the_later_ones(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    for epoch in (1, 2, 3):
        report_epoch(recorder, trial, epoch, val_accuracy=0.1)
    start(recorder, trial)  # its worker died; epoch 2 was the last in its checkpoint
    report_epoch(recorder, trial, 2, val_accuracy=0.9)
    accuracies = [(epoch.epoch, epoch.val_accuracy) for epoch in only(recorder).epochs]
    assert accuracies == [(1, 0.1), (2, 0.9)]


def test_trial_started_again_keeps_what_it_reported(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    start(recorder, trial)
    assert only(recorder).epochs == (make_epoch(1),)


def test_time_of_a_trial_started_again_counts_from_its_first_start(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    report_epoch(recorder, trial, 1)
    start(recorder, trial)
    report(recorder, trial, progress_report(make_epoch(2), "running"), started=STARTED + 10, wall_seconds=1.0)
    assert only(recorder).started == datetime.datetime.fromtimestamp(STARTED, datetime.UTC)
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
    if dies:
        recorder.on_trial_error(0, [], trial)
    else:
        finish(recorder, trial)
    assert only(recorder).status is (TrialStatus.FAILED if dies else TrialStatus.INTERRUPTED)
    assert watcher.seen[-1][1] == only(recorder)


def test_trials_keep_the_order_of_their_submission_however_their_workers_start(recorder: TrialRecorder) -> None:
    """Ties in the ranking are broken by it."""
    c, a, b = trials = [FakeTrial(trial_id) for trial_id in ("c", "a", "b")]
    start(recorder, a, trials[:2])
    start(recorder, b, trials)
    start(recorder, c, trials)
    start(recorder, c, [a, b, c])  # Tune appends a trial that is tried again
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


def test_recorder_is_pickled_without_its_observer_and_goes_on(recorder: TrialRecorder, watcher: Watcher) -> None:
    watcher.display = lambda: None  # type: ignore[attr-defined]  # as little to be pickled as a terminal
    trial = FakeTrial("a")
    start(recorder, trial)
    copy = pickle.loads(pickle.dumps(recorder))
    report_epoch(copy, trial, 1, "completed")
    finish(copy, trial)
    assert only(copy).status is TrialStatus.COMPLETED
    assert len(watcher.seen) == 1  # the copy tells nobody
    report_epoch(recorder, trial, 1)
    assert len(watcher.seen) == 2  # the original still does


# Files


class Clock:
    """Stands for the recorder's monotonic clock."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, recorder: TrialRecorder) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder_module, "time", clock)
    recorder._written = clock.now
    return clock


def test_files_are_written_when_a_trial_ends_but_not_more_often_than_every_few_seconds(
    recorder: TrialRecorder, tmp_path: Path, clock: Clock
) -> None:
    def end_trial(trial_id: str) -> int:
        trial = FakeTrial(trial_id)
        start(recorder, trial)
        report_epoch(recorder, trial, 1, "completed")
        finish(recorder, trial)
        return len(load_trials(tmp_path)) if (tmp_path / "trials.parquet").exists() else 0

    clock.now += recorder_module.WRITE_EVERY_SECONDS - 0.1
    assert end_trial("a") == 0
    clock.now += 0.2
    assert end_trial("b") == 2
    clock.now += recorder_module.WRITE_EVERY_SECONDS - 0.1
    assert end_trial("c") == 2
    clock.now += 0.2
    start(recorder, FakeTrial("d"))
    assert len(load_trials(tmp_path)) == 2  # a start writes nothing
    assert end_trial("e") == 5


def test_written_files_hold_what_was_reported(recorder: TrialRecorder, tmp_path: Path) -> None:
    done, open_trial, dead = FakeTrial("1e5"), FakeTrial("16076160"), FakeTrial("dead")
    start(recorder, done)
    start(recorder, open_trial)
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
    recorder: TrialRecorder, watcher: Watcher, tmp_path: Path
) -> None:
    ended, running = FakeTrial("a"), FakeTrial("b")
    start(recorder, ended, [ended, running])
    start(recorder, running, [ended, running])
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
    [written] = load_trials(tmp_path)
    assert (written.status, written.epochs) == (TrialStatus.INTERRUPTED, (make_epoch(1),))


# The ledger


def test_ledger_is_known_when_the_search_is_over_and_written_with_it(recorder: TrialRecorder, tmp_path: Path) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    spent = {"training": 0.2, "validation": 0.1}
    report(
        recorder, trial, progress_report(make_epoch(1, train_seconds=0.2, val_seconds=0.1), "completed"), spent=spent
    )
    finish(recorder, trial)
    before = recorder.ledger
    assert before is None
    recorder.write()
    assert load_ledger(tmp_path) is None
    recorder.finish()
    ledger = recorder.ledger
    assert ledger is not None
    assert load_ledger(tmp_path) == ledger
    assert (ledger.slots, ledger.seconds["training"], ledger.seconds["validation"]) == (2, 0.2, 0.1)


def test_time_of_a_trial_cut_off_at_the_end_counts_as_interrupted(recorder: TrialRecorder) -> None:
    start(recorder, FakeTrial("a"))
    time.sleep(0.1)
    recorder.finish()
    assert recorder.ledger is not None
    assert recorder.ledger.seconds["interrupted"] == pytest.approx(0.1, abs=0.09)


def test_time_of_a_worker_that_died_counts_as_failed_though_the_trial_completes(recorder: TrialRecorder) -> None:
    trial = FakeTrial("a")
    start(recorder, trial)
    time.sleep(0.1)
    recorder.on_trial_recover(0, [], trial)
    trial.temporary_state.ray_actor = "Actor(AmpTrainable, 2)"
    start(recorder, trial)
    spent = {"training": 0.2}
    report(recorder, trial, progress_report(make_epoch(1, train_seconds=0.2), "completed"), spent=spent)
    finish(recorder, trial)
    recorder.finish()
    assert only(recorder).worker == 2
    assert recorder.ledger is not None
    assert recorder.ledger.seconds["failed"] == pytest.approx(0.1, abs=0.09)
    assert recorder.ledger.seconds["training"] == 0.2
