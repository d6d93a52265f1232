from pathlib import Path
from typing import Any

import past_runs as made
import pytest
from ray import tune
from ray.tune.experiment import Experiment, Trial

from tune_amp.search.history import RecordedTrial
from tune_amp.search.source import KeptWorkers, TrialSource
from tune_amp.trial.config import TrialConfig, TrialStatus


class Numbered:
    """Suggests learning rates 1, 2, 3, ...; Optuna's number of a trial is a hundred times that."""

    def __init__(self, past: int = 0) -> None:
        self.suggested = past
        self.numbers: dict[str, int] = {}
        self.fault: OSError | None = None
        self.completed: list[str] = []
        self.causes: list[str] = []

    def suggest(self, trial_id: str) -> TrialConfig:
        if self.fault is not None:
            raise self.fault
        self.suggested += 1
        self.numbers[trial_id] = 100 * self.suggested
        return TrialConfig(lr=float(self.suggested))

    def find_number(self, trial_id: str) -> int:
        return self.numbers[trial_id]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None, error: bool, cause: str) -> None:
        self.completed.append(trial_id)
        self.causes.append(cause)


class Slots:
    """As many as it is told."""

    count = 2

    def __call__(self) -> int:
        return self.count


class Desk:
    """A source with everything around it."""

    def __init__(self, folder: Path, num_samples: int, past: list[RecordedTrial]) -> None:
        self.searcher, self.slots = Numbered(len(past)), Slots()
        self.searcher.numbers = {trial.trial_id: trial.number for trial in past}
        self.submitted: list[tuple[str, int]] = []
        self.faults: list[str] = []
        self.workers = KeptWorkers()
        self.source = TrialSource(
            self.searcher,  # type: ignore[arg-type]
            count_slots=self.slots,
            on_submit=self.note,
            on_fault=self.faults.append,
            past=past,
            workers=self.workers,
        )
        self.source.add_configurations(
            [Experiment("run", tune.Trainable, num_samples=num_samples, storage_path=str(folder))]
        )

    def note(self, trial: Trial, number: int, config: TrialConfig) -> None:
        assert vars(config) == trial.config
        self.submitted.append((trial.trial_id, number))

    def draw(self) -> list[Trial]:
        """Trials until there are none to be had now."""
        drawn = []
        while (trial := self.source.next_trial()) is not None:
            drawn.append(trial)
        return drawn


@pytest.fixture
def make_desk(tmp_path: Path) -> Any:
    def make(num_samples: int = 4, past: list[RecordedTrial] | None = None) -> Desk:
        return Desk(tmp_path, num_samples, past or [])

    return make


def past_trial(trial_id: str, place: int, status: TrialStatus | None = None) -> RecordedTrial:
    config = TrialConfig(lr=place / 10)
    return made.recorded(trial_id, place - 1, place=place, config=config, status=status)


def rates(trials: list[Trial]) -> list[float]:
    return [trial.config["lr"] for trial in trials]


def tags(trials: list[Trial]) -> list[str]:
    return [trial.experiment_tag for trial in trials]


def test_no_more_trials_run_than_there_are_slots(make_desk: Any) -> None:
    desk = make_desk()
    first = desk.draw()
    assert rates(first) == [1.0, 2.0]
    assert desk.draw() == []
    desk.source.on_trial_complete(first[0].trial_id)
    [third] = desk.draw()
    assert third.config["lr"] == 3.0
    assert desk.searcher.completed == [first[0].trial_id]
    assert not desk.source.is_finished()


@pytest.mark.parametrize(
    ("ends", "kept"),
    [
        ([{"status": "running", "done": True}], True),  # by the scheduler
        ([{"status": "completed"}], True),
        ([{"status": "diverged"}], True),
        ([{"status": "failed"}], False),
        ([{"status": "out_of_memory"}], False),
        ([None], False),
        ([{"status": "completed"}, {"status": "completed"}], True),  # Tune may give a worker one more trial
        ([{"status": "completed"}, {"status": "failed"}], False),
        ([{"status": "failed"}, {"status": "completed"}], True),
    ],
)
def test_worker_of_the_last_trials_is_kept_if_its_last_end_was_sound(
    ends: list[dict[str, Any] | None], kept: bool, make_desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "error_file", None)
    desk = make_desk(num_samples=len(ends))
    desk.slots.count = len(ends)
    for trial, result in zip(desk.draw(), ends, strict=True):
        trial.temporary_state.ray_actor = "worker"
        desk.source.on_trial_complete(trial.trial_id, result, error=result is None)
    assert desk.workers.actors == (["worker"] if kept else [])


def test_no_worker_is_kept_while_trials_are_left_or_if_tune_has_ended_it(make_desk: Any) -> None:
    desk = make_desk(num_samples=3)
    first, second = desk.draw()
    for trial in (first, second):
        trial.temporary_state.ray_actor = "worker"
    desk.source.on_trial_complete(first.trial_id, {"status": "completed"})
    assert desk.workers.actors == []
    [third] = desk.draw()
    third.temporary_state.ray_actor = None
    desk.source.on_trial_complete(third.trial_id, {"status": "completed"})
    assert desk.workers.actors == []
    desk.source.on_trial_complete(second.trial_id, {"status": "completed"})
    assert desk.workers.actors == ["worker"]


def test_no_worker_is_kept_after_one_has_died(make_desk: Any) -> None:
    """The retry may need the resources that the others hold."""
    desk = make_desk(num_samples=2)
    first, second = desk.draw()
    first.temporary_state.ray_actor, second.temporary_state.ray_actor = "one", "two"
    desk.source.on_trial_complete(first.trial_id, {"status": "completed"})
    assert desk.workers.actors == ["one"]
    desk.workers.drop()
    desk.source.on_trial_complete(second.trial_id, {"status": "completed"})
    assert desk.workers.actors == []


def test_the_cause_of_a_workers_death_is_passed_on_with_the_end_of_the_trial(
    make_desk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = make_desk()
    path = tmp_path / "error.txt"
    path.write_text("Traceback:\nOSError: The actor died\n")
    monkeypatch.setattr(Trial, "error_file", str(path))
    for trial, error in zip(desk.draw(), (True, False), strict=True):
        desk.source.on_trial_complete(trial.trial_id, error=error)
    assert desk.searcher.causes == ["OSError: The actor died", ""]


def test_slots_are_counted_anew_each_time(make_desk: Any) -> None:
    desk = make_desk(num_samples=9)
    first = desk.draw()
    desk.slots.count = 5  # nodes have joined
    assert len(desk.draw()) == 3
    desk.slots.count = 1  # and left; their trials move
    for trial in first:
        desk.source.on_trial_complete(trial.trial_id)
    assert desk.draw() == []


def test_where_no_node_is_left_one_trial_waits_for_the_next(make_desk: Any) -> None:
    desk = make_desk()
    desk.slots.count = 0
    assert len(desk.draw()) == 1


def test_as_many_are_submitted_as_were_asked_for(make_desk: Any) -> None:
    desk = make_desk(num_samples=3)
    desk.slots.count = 9
    trials = desk.draw()
    assert rates(trials) == [1.0, 2.0, 3.0]
    assert tags(trials) == ["1", "2", "3"]
    assert desk.source.is_finished()
    assert desk.submitted == [(trial.trial_id, 100 * number) for number, trial in enumerate(trials, start=1)]


def test_trials_that_were_cut_off_come_first_with_their_own_name_and_settings(make_desk: Any) -> None:
    over = past_trial("over", 1, TrialStatus.COMPLETED)
    desk = make_desk(num_samples=5, past=[over, past_trial("16076160", 2), past_trial("cut", 3)])
    desk.slots.count = 9
    trials = desk.draw()
    assert [trial.trial_id for trial in trials[:2]] == ["16076160", "cut"]
    assert tags(trials) == ["2", "3", "4", "5"]
    assert rates(trials) == [0.2, 0.3, 4.0, 5.0]
    assert [number for _, number in desk.submitted] == [1, 2, 400, 500]
    assert desk.source.is_finished()


def test_run_whose_trials_are_all_over_has_none_left(make_desk: Any) -> None:
    desk = make_desk(num_samples=1, past=[past_trial("over", 1, TrialStatus.STOPPED)])
    assert desk.source.is_finished()
    assert desk.draw() == []


def test_study_that_cannot_be_written_ends_the_search(make_desk: Any) -> None:
    desk = make_desk()
    desk.searcher.fault = OSError(28, "No space left on device")
    assert desk.draw() == []
    assert desk.faults == ["OSError: [Errno 28] No space left on device"]
    assert desk.source.is_finished()


def test_nothing_is_pickled_for_a_restore_that_never_comes(make_desk: Any, tmp_path: Path) -> None:
    desk = make_desk()
    (tmp_path / "state").mkdir()
    desk.source.save_to_dir(str(tmp_path / "state"), session_str="x")
    assert list((tmp_path / "state").iterdir()) == []
