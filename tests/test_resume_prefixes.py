"""A search that is cut off after any write, or in the middle of one, ends as if nothing had happened.

No Ray: a loop of ours calls searcher, scheduler, source and recorder in the order in which Tune's controller does,
trials train in no time, and a search is cut off by taking its two journals as they were on disk at that moment.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from fault_runs import check_no_needless_work
from past_runs import STORAGE
from ray import tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import TrialScheduler
from records import PROVENANCE, make_epoch
from small_runs import untimed

from tune_amp.cluster.failures import find_cause
from tune_amp.cluster.trainable import REPORT, WORKER_RETRIES, failure_report, progress_report, read_report
from tune_amp.results.journal import JOURNAL_VERSION, Journal, read_journal
from tune_amp.results.progress import Observer, SearchProgress
from tune_amp.results.provenance import Provenance
from tune_amp.results.run_folder import RunFolder
from tune_amp.search.history import RunHistory, open_history
from tune_amp.search.mending import mend_run
from tune_amp.search.options import SearchOptions
from tune_amp.search.recorder import TrialRecorder
from tune_amp.search.run import _pass_on_end
from tune_amp.search.schedulers import build_scheduler, restore_scheduler
from tune_amp.search.source import TrialSource
from tune_amp.search.study import AmpSearch
from tune_amp.space.space import load_space
from tune_amp.trial.config import RUNNING, InputError, TrialConfig, TrialStatus

NUM_SAMPLES, MAX_EPOCHS, TRAIN_IMAGES = 7, 4, 1413
SAVED_EVERY = 2
SPACE = """
parameters:
  lr: {low: 1.0e-4, high: 1.0, log: true}
  batch_size: {low: 32, high: 512, power_of_two: true}
fixed: {precision: bf16}
"""
STUDY_NAME = "run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to search whose end does not depend on where it was cut off."""

    sampler: str
    scheduler: str
    slots: int
    objectives: tuple[str, ...] = ("val_accuracy",)


MODES = {
    "tpe and asha, one slot": Mode(sampler="tpe", scheduler="asha", slots=1),
    "tpe and median, one slot": Mode(sampler="tpe", scheduler="median", slots=1),
    "random and hyperband, one slot": Mode(sampler="random", scheduler="hyperband", slots=1),
    "random side by side": Mode(sampler="random", scheduler="none", slots=3),
    "several objectives": Mode(sampler="nsga2", scheduler="none", slots=1, objectives=("val_accuracy", "val_loss")),
}
EVERY = {"tpe and asha, one slot": 1}
"""Of what is searched with by default, every cut; of the others, one in so many."""


def describe(mode: Mode) -> Provenance:
    about: dict[str, Any] = {"run": STUDY_NAME, "space_text": SPACE, "train_images": TRAIN_IMAGES}
    return dataclasses.replace(PROVENANCE, objective=",".join(mode.objectives), **about)


class Training(tune.Trainable):
    """Is never run."""


class Disk:
    """What outlives a search that is cut off: its checkpoints, and which faults have struck."""

    def __init__(self) -> None:
        self.saved: dict[str, int] = {}
        self.struck: set[str] = set()


class Loop:
    """Ray Tune's controller (2.60, ``tune_controller.py``), as far as our parts see it.

    The second trial diverges, the fourth fails by an exception, the fifth's worker always dies, the third's once.

    Args:
        folder: the run folder.
        mode: how is searched.
        disk: what was there before.
        history: of the run.
    """

    def __init__(self, folder: Path, mode: Mode, disk: Disk, history: RunHistory) -> None:
        self.folder, self.disk, self.history = folder, disk, history
        space = load_space(str(folder.parent / "space.yaml"))
        lines = mend_run(folder, history)
        assert lines == [] or not history.trials  # half of its first line tells no study from another file
        self.recorder = TrialRecorder(
            folder,
            history,
            SearchProgress(
                run=STUDY_NAME,
                model="simple_net",
                dataset="digits",
                objectives=mode.objectives,
                num_samples=NUM_SAMPLES,
                time_budget=None,
                slots=mode.slots,
                started=0.0,
            ),
            Observer(),
            storage_root=str(folder),
            begin=0.0,
            explain_death=find_cause,
            on_fault=pytest.fail,
        )
        self.searcher = AmpSearch(
            space,
            {"model": "simple_net", "dataset": "digits", "max_epochs": MAX_EPOCHS, "seed": 0},
            train_images=TRAIN_IMAGES,
            objectives=mode.objectives,
            seed=0,
            folder=folder,
            study_name=STUDY_NAME,
            sampler=mode.sampler,
            num_samples=NUM_SAMPLES,
            past=history.trials,
        )
        options = SearchOptions(
            scheduler=mode.scheduler, objective=",".join(mode.objectives), max_epochs=MAX_EPOCHS, grace_period=2
        )
        self.scheduler: Any = build_scheduler(options, lambda trial: None)
        restore_scheduler(self.scheduler, [trial.trial_id for trial in history.trials], history.reports)
        self.recorder.open_session(num_samples=NUM_SAMPLES, slots=mode.slots, arguments={}, storage=STORAGE)
        for trial in history.trials:
            _pass_on_end(trial, self.recorder, self.searcher, self.scheduler)
        self.source: Any = TrialSource(
            self.searcher,
            count_slots=lambda: mode.slots,
            on_submit=self.recorder.add_trial,
            on_fault=pytest.fail,
            past=history.trials,
        )
        experiment = Experiment("ray", run=Training, num_samples=NUM_SAMPLES, storage_path=str(folder))
        self.source.add_configurations([experiment])
        self.live: list[Trial] = []
        self.at: dict[str, int] = {}
        self.deaths: dict[str, int] = {}

    def run(self) -> None:
        """Until no trial is left."""
        while True:
            while (trial := self.source.next_trial()) is not None:
                self.scheduler.on_trial_add(self, trial)
                trial.storage = Staging(f"{self.folder}/{trial.trial_id}")
                self.live.append(trial)
                self.deaths[trial.trial_id] = 0
                self.start(trial)
            if not self.live:
                break
            for trial in list(self.live):
                self.step(trial)
        self.recorder.finish()
        self.searcher.close()

    def start(self, trial: Trial) -> None:
        trial.set_status(Trial.RUNNING)
        trial.temporary_state.ray_actor = cast("Any", f"worker {len(self.disk.struck)}")
        paths = self.history.find(trial.trial_id).checkpoints
        self.at.setdefault(trial.trial_id, self.disk.saved[paths[0]] if paths else 0)
        self.recorder.on_trial_start(0, [], trial)

    def step(self, trial: Trial) -> None:
        epoch, place = self.at[trial.trial_id] + 1, int(trial.experiment_tag)
        if place == 5 and epoch == 2:
            self.die(trial)
            return
        if place == 3 and epoch == 2 and "third" not in self.disk.struck:
            self.disk.struck.add("third")
            self.die(trial)
            return
        self.at[trial.trial_id] = epoch
        self.report(trial, self.train(trial, place, epoch))

    def train(self, trial: Trial, place: int, epoch: int) -> dict[str, Any]:
        """A report as a worker makes it."""
        config = TrialConfig(**trial.config)
        accuracy = round(0.9 - 0.1 * abs(config.lr - 0.01) - 0.2 / epoch - config.batch_size / 10_000, 6)
        metrics = make_epoch(epoch, val_accuracy=accuracy, val_loss=round(1 - accuracy, 6))
        if place == 4 and epoch == 2:
            told = failure_report(ValueError("bad luck"))
        elif place == 2 and epoch == 2:
            told = progress_report(metrics, TrialStatus.DIVERGED, "diverged: weights are not finite")
        else:
            told = progress_report(metrics, TrialStatus.COMPLETED if epoch == MAX_EPOCHS else RUNNING)
        about = {"device": "cpu", "num_threads": 1, "setup_seconds": 0.0, "checkpoint_seconds": 0.0}
        told |= about
        return told | {"training_iteration": epoch, "time_total_s": 0.0, REPORT: read_report(told)}

    def report(self, trial: Trial, result: dict[str, Any]) -> None:
        result["trial_id"] = trial.trial_id
        decision = TrialScheduler.STOP
        if not result["done"]:
            decision = self.scheduler.on_trial_result(self, trial, dict(result))
        if decision == TrialScheduler.STOP:
            result["done"] = True
        else:
            self.source.on_trial_result(trial.trial_id, dict(result))
        epoch = result.get("epoch", 0)
        self.recorder.on_trial_result(0, [], trial, result)
        trial.update_last_result(result)
        if decision != TrialScheduler.STOP and epoch % SAVED_EVERY == 0:
            self.save(trial, epoch)
        if decision == TrialScheduler.STOP:
            last = dict(trial.last_result)
            self.scheduler.on_trial_complete(self, trial, last)
            self.source.on_trial_complete(trial.trial_id, last)
            self.recorder.on_trial_complete(0, [], trial)
            self.live.remove(trial)

    def save(self, trial: Trial, epoch: int) -> None:
        path = f"{trial.trial_id}/checkpoint_{len(self.disk.saved)}"
        self.disk.saved[path] = epoch
        self.recorder.on_checkpoint(0, [], trial, Checkpoint(f"{self.folder}/{path}"))

    def die(self, trial: Trial) -> None:
        self.deaths[trial.trial_id] += 1
        if self.deaths[trial.trial_id] <= WORKER_RETRIES:
            self.scheduler.on_trial_error(self, trial)
            self.scheduler.on_trial_add(self, trial)
            self.recorder.on_trial_recover(0, [], trial)
            saved = [epoch for path, epoch in self.disk.saved.items() if path.startswith(trial.trial_id)]
            self.at[trial.trial_id] = max(saved, default=0)
            self.start(trial)
        else:
            self.scheduler.on_trial_error(self, trial)
            self.source.on_trial_complete(trial.trial_id, error=True)
            self.recorder.on_trial_error(0, [], trial)
            self.live.remove(trial)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: str


@dataclasses.dataclass(frozen=True)
class Staging:
    """Where Tune would write why a worker died; its own place is known only while Ray runs."""

    trial_driver_staging_path: str


def begin(folder: Path, mode: Mode, disk: Disk) -> Loop:
    """A new search, to its end."""
    folder.mkdir()
    with Journal(RunFolder(folder).journal) as journal:
        about = {"arguments": {}, "provenance": dataclasses.asdict(describe(mode))}
        journal.append({"event": "run", "version": JOURNAL_VERSION, **about})
        loop = Loop(folder, mode, disk, RunHistory(journal, describe(mode), {}))
        loop.run()
    return loop


def go_on(folder: Path, mode: Mode, disk: Disk) -> Loop:
    """One that was cut off, to its end."""
    with open_history(folder) as history:
        loop = Loop(folder, mode, disk, history)
        loop.run()
    return loop


def summarize(loop: Loop) -> dict[str, Any]:
    """All that should be the same, without ids and clocks."""
    places = {trial.trial_id: place for place, trial in enumerate(loop.recorder.trials, start=1)}
    told = [trial for trial in loop.searcher.study.trials if "trial_id" in trial.user_attrs]
    latest = {places[trial.user_attrs["trial_id"]]: trial for trial in told}
    return {
        "records": [
            (trial.config, str(trial.status), trial.error, [untimed(epoch) for epoch in trial.epochs])
            for trial in loop.recorder.trials
        ],
        "study": {
            place: (trial.state.name, trial.values, trial.params, trial.intermediate_values, trial.constraints)
            for place, trial in latest.items()
        },
        "scheduler": describe_scheduler(loop.scheduler, places),
    }


def describe_scheduler(scheduler: Any, places: Mapping[str, int]) -> list[Any]:
    """What it knows of each trial, by the trial's place."""
    known = [
        [
            (milestone, {places[trial_id]: value for trial_id, value in recorded.items()})
            for milestone, recorded in rungs
        ]
        for rungs in (bracket._rungs for bracket in getattr(scheduler, "_brackets", ()))
    ]
    results = {places[key.trial_id]: len(seen) for key, seen in getattr(scheduler, "_results", {}).items()}
    return [known, results, {places[trial_id]: epoch for trial_id, epoch in scheduler._seen_epochs.items()}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """What was on disk."""

    sizes: dict[str, int]
    saved: dict[str, int]
    struck: frozenset[str]


class Recorded:
    """A search to its end, and what was on disk after each of its writes.

    Args:
        run: begins it, or goes on with it.
        folder: of the run.
        mode: how is searched.
        disk: what was there before.
        monkeypatch: lets us look whenever a write is said to be on disk.
    """

    def __init__(
        self,
        run: Callable[[Path, Mode, Disk], Loop],
        folder: Path,
        mode: Mode,
        disk: Disk,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder.parent.mkdir(exist_ok=True)
        (folder.parent / "space.yaml").write_text(SPACE)
        self._folder, self._disk = folder, disk
        self.moments: list[Moment] = []
        sync = os.fsync

        def look(descriptor: int) -> None:
            sync(descriptor)
            self.moments.append(self._look())

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", look)
            self.loop = run(folder, mode, disk)
        self.end = summarize(self.loop)
        self.content = {name: (folder / name).read_bytes() for name in ("reports.journal", "study.journal")}

    def _look(self) -> Moment:
        paths = {name: self._folder / name for name in ("reports.journal", "study.journal")}
        sizes = {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}
        return Moment(sizes=sizes, saved=dict(self._disk.saved), struck=frozenset(self._disk.struck))

    def list_cuts(self, *, torn: bool) -> list[Moment]:
        """After each write; or in the middle of each, and before the last byte of it."""
        whole = [moment for i, moment in enumerate(self.moments) if i == 0 or moment.sizes != self.moments[i - 1].sizes]
        if not torn:
            return whole
        cuts = []
        for before, after in itertools.pairwise(whole):
            [name] = [name for name in after.sizes if after.sizes[name] > before.sizes[name]]
            grown = after.sizes[name] - before.sizes[name]
            for part in (grown // 2, grown - 1):
                sizes = before.sizes | {name: before.sizes[name] + part}
                cuts.append(dataclasses.replace(before, sizes=sizes))
        return cuts

    def cut_off(self, folder: Path, moment: Moment) -> Disk:
        """The run folder as it was at a moment, made anew."""
        folder.mkdir(parents=True)
        (folder.parent / "space.yaml").write_text(SPACE)
        for name, size in moment.sizes.items():
            if size:
                (folder / name).write_bytes(self.content[name][:size])
        disk = Disk()
        disk.saved.update(moment.saved)
        disk.struck.update(moment.struck)
        return disk


@pytest.mark.timeout(600)
@pytest.mark.parametrize("torn", [False, True], ids=["between writes", "within writes"])
@pytest.mark.parametrize("name", MODES)
def test_search_cut_off_anywhere_ends_as_if_it_had_not_been(
    name: str, torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MODES[name]
    recorded = Recorded(begin, tmp_path / "whole" / STUDY_NAME, mode, Disk(), monkeypatch)
    statuses = [str(trial.status) for trial in recorded.loop.recorder.trials]
    assert statuses[1] == "diverged"
    assert statuses[3:5] == ["failed", "failed"]
    cuts = recorded.list_cuts(torn=torn)
    assert len(cuts) > 100
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 3/4 of the time; nothing cuts these off
    for number, moment in enumerate(cuts[:: EVERY.get(name, 4)]):
        folder = tmp_path / f"cut {number}" / STUDY_NAME
        disk = recorded.cut_off(folder, moment)
        if moment.sizes["reports.journal"] < recorded.moments[0].sizes["reports.journal"]:
            with pytest.raises(InputError, match="start it again"):
                go_on(folder, mode, disk)
            continue
        loop = go_on(folder, mode, disk)
        assert summarize(loop) == recorded.end, f"cut at {moment.sizes}"
        assert [trial.state.name for trial in loop.searcher.study.trials if trial.state.name == "RUNNING"] == []
        check_no_needless_work(read_journal(RunFolder(folder).journal))


@pytest.mark.timeout(600)
def test_search_cut_off_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MODES["tpe and asha, one slot"]
    recorded = Recorded(begin, tmp_path / "whole" / STUDY_NAME, mode, Disk(), monkeypatch)
    cuts = [*recorded.list_cuts(torn=False)[3::12], *recorded.list_cuts(torn=True)[9::24]]
    for number, moment in enumerate(cuts):
        folder = tmp_path / f"cut {number}" / STUDY_NAME
        disk = recorded.cut_off(folder, moment)
        again = Recorded(go_on, folder, mode, disk, monkeypatch)
        assert again.end == recorded.end
        cuts_again = [*again.list_cuts(torn=False)[number % 7 :: 12], *again.list_cuts(torn=True)[number % 5 :: 24]]
        for number_again, moment_again in enumerate(cuts_again):
            folder = tmp_path / f"cut {number} {number_again}" / STUDY_NAME
            disk = again.cut_off(folder, moment_again)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda descriptor: None)
                loop = go_on(folder, mode, disk)
            assert summarize(loop) == recorded.end, f"cut at {moment.sizes}, then at {moment_again.sizes}"
            check_no_needless_work(read_journal(RunFolder(folder).journal))


@pytest.mark.parametrize("name", ["tpe and asha, one slot", "random side by side"])
def test_search_whose_study_is_lost_ends_as_if_it_had_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MODES[name]
    recorded = Recorded(begin, tmp_path / "whole" / STUDY_NAME, mode, Disk(), monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for number, moment in enumerate(recorded.list_cuts(torn=False)[5::7]):
        folder = tmp_path / f"cut {number}" / STUDY_NAME
        disk = recorded.cut_off(folder, moment)
        RunFolder(folder).study.unlink(missing_ok=True)
        loop = go_on(folder, mode, disk)
        assert summarize(loop) == recorded.end, f"cut at {moment.sizes}"
        check_no_needless_work(read_journal(RunFolder(folder).journal))
        with open_history(folder) as past:
            assert mend_run(folder, past) == []  # the journal's numbers are those of the rebuilt study
