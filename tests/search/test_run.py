import dataclasses
import itertools
import json
import queue
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import past_runs
import pytest
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from records import PROVENANCE, make_epoch, make_trial

from tune_amp.cluster.checkpoints import RAY_FOLDER, prepare_storage
from tune_amp.cluster.interrupt import StopRequest
from tune_amp.cluster.resources import TrialResources
from tune_amp.cluster.session import RaySession, ray_session
from tune_amp.results.confirmed import ConfirmedRun
from tune_amp.results.journal import read_journal
from tune_amp.results.progress import ConfirmProgress, Observer, SearchProgress
from tune_amp.results.records import TrialRecord, load_best, load_provenance, load_trials, load_trials_file
from tune_amp.results.run_folder import RunFolder
from tune_amp.results.utilisation import SlotUse, utilisation
from tune_amp.reuse.final import find_differences, replay_trial
from tune_amp.search.history import begin_run, open_history
from tune_amp.search.options import SearchOptions
from tune_amp.search.plan import SearchPlan, list_shared, plan_resources, plan_search
from tune_amp.search.run import SearchResult, find_failing, run_search, stop_if_failing, was_interrupted
from tune_amp.search.study import AmpSearch
from tune_amp.space.space import load_space, parse_space
from tune_amp.training.data import Dataset
from tune_amp.trial.config import InputError, TrialStatus

SPACE = """
parameters:
  lr: {low: 1.0e-3, high: 1.0e-2, log: true}
  init_scale: {low: 2^8, high: 2^16, power_of_two: true}
fixed: {precision: fp16, batch_size: 128}
"""
BATCHES = """
parameters:
  batch_size: {choices: [100, 110, 120, 256]}
fixed: {lr: 1.0e-3}
"""


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    """One Ray for all searches here: it takes 7 s to start. It believes in a GPU, whatever the machine has."""
    told: queue.SimpleQueue[RaySession] = queue.SimpleQueue()
    with ray_session(num_cpus=2, num_gpus=1, run="test_search") as session, session.dashboard(told.put):
        yield told.get(timeout=60)


Search = Callable[..., SearchResult]


@pytest.fixture
def search(digits: Dataset, tmp_path: Path) -> Search:
    def run(space_text: str, observer: Observer | None = None, **options: Any) -> SearchResult:
        return search_and_check(tmp_path, digits, space_text, observer or Observer(), **options)

    return run


def search_and_check(
    folder: Path, dataset: Dataset, space_text: str, observer: Observer, **options: Any
) -> SearchResult:
    source = folder / "space.yaml"
    source.write_text(space_text)
    (folder / "run").mkdir(exist_ok=True)
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    plan = plan_search(
        load_space(str(source)),
        dataset,
        SearchOptions(**{"num_samples": 4, "max_epochs": 2, "gpus_per_trial": 0.0, "confirm_seeds": 0, **options}),
        folder=folder / "run",
        command=("scripts/search.py", "--seed", "3"),
    )
    result = run_search(plan, observer)
    check_consistency(result)
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c  # Tune leaves its own behind
    return result


def check_consistency(result: SearchResult) -> None:
    """What holds after any search, however its trials ended."""
    assert repr(load_trials(result.folder)) == repr(list(result.trials))  # repr: NaN is not equal to itself
    by_id = {trial.trial_id: trial for trial in result.trials}
    for told in load_study(result.folder).trials:
        assert told.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        trial_id = told.user_attrs["trial_id"]  # one that never got a worker is in the study alone
        assert told.user_attrs["status"] == (by_id[trial_id].status if trial_id in by_id else "interrupted")
    for trial in result.trials:
        assert [epoch.epoch for epoch in trial.epochs] == list(range(1, len(trial.epochs) + 1))
        assert trial.error is None or "\n" not in trial.error
    assert (result.folder / "best.parquet").exists() == bool(result.ranked)
    if not any(trial.status is TrialStatus.INTERRUPTED for trial in result.trials):
        assert list(result.folder.rglob("checkpoint_*")) == []
    slot_seconds = result.slot_time.slots * result.slot_time.wall_seconds
    assert sum(utilisation(result.trials, result.slot_time).values()) == pytest.approx(slot_seconds, rel=0.01)
    assert load_trials_file(result.folder).slot_time == result.slot_time
    assert list(result.folder.glob(".*")) == []  # no half-written file


def load_study(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(RunFolder(folder).study)))
    return optuna.load_study(study_name=folder.name, storage=storage)


class Visitor(Observer):
    """An observer that keeps what it was told, and once, while trials run, looks at Ray's dashboard."""

    def __init__(self, session: RaySession | None = None) -> None:
        self.session = session
        self.progress: list[SearchProgress] = []
        self.ended: list[TrialRecord] = []
        self.answers: dict[str, Any] = {}

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        self.progress.append(progress)
        if ended is not None:
            self.ended.append(ended)
        if self.session and not self.answers and any(trial.epochs for trial in progress.trials):
            assert self.session.token_path is not None
            for path in ("/logical/actors", "/api/jobs/"):
                headers = {"Authorization": f"Bearer {self.session.token_path.read_text()}"}
                request = urllib.request.Request(f"{self.session.dashboard_url}{path}", headers=headers)
                with urllib.request.urlopen(request, timeout=20) as answer:
                    self.answers[path] = json.load(answer)

    def on_confirmation(self, progress: ConfirmProgress, ended: ConfirmedRun | None) -> None:
        pytest.fail("no search here is confirmed")

    @property
    def most_running(self) -> int:
        return max(len(progress.running) for progress in self.progress)


# One search, looked at from all sides


@pytest.fixture(scope="module")
def finished(
    session: RaySession, digits: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SearchResult, Visitor]:
    visitor = Visitor(session)
    folder = tmp_path_factory.mktemp("finished")
    result = search_and_check(folder, digits, SPACE, visitor, num_samples=6, max_epochs=3, seed=3, top_k=2)
    return result, visitor


Finished = tuple[SearchResult, Visitor]


@pytest.mark.slow
def test_every_trial_ends_with_a_status_and_its_epochs(finished: Finished) -> None:
    trials = finished[0].trials
    assert len(trials) == 6
    assert {trial.status for trial in trials} == {TrialStatus.COMPLETED, TrialStatus.STOPPED}
    for trial in trials:
        assert (len(trial.epochs) == 3) == (trial.status is TrialStatus.COMPLETED)
        assert (trial.config.max_epochs, trial.config.seed, trial.config.dataset) == (3, 3, "digits")
        assert (trial.device, trial.num_threads, trial.error) == ("cpu", 1, None)
        assert trial.wall_seconds > 0
        assert trial.last is not None
        assert trial.last.steps == 11 * len(trial.epochs)


@pytest.mark.slow
def test_observer_sees_each_end_once_and_what_the_files_hold(finished: Finished) -> None:
    result, visitor = finished
    assert len(visitor.ended) == len(result.trials)
    assert {trial.trial_id: trial for trial in visitor.ended} == {trial.trial_id: trial for trial in result.trials}
    assert visitor.most_running in (1, 2)  # the second worker may start after the first has trained them all
    assert visitor.progress[-1].running == frozenset()


@pytest.mark.slow
def test_trials_have_names_to_be_read(finished: Finished) -> None:
    names = [trial.trial_name for trial in finished[0].trials]
    for number, name in enumerate(names, start=1):
        assert re.fullmatch(rf"{number:02d}-fp16-lr0\.0\d+-b128-scale2\^\d+", name)
    assert not [path for path in (finished[0].folder / RAY_FOLDER).iterdir() if path.is_dir()]  # empty ones are gone


@pytest.mark.slow
def test_winner_is_the_best_completed_trial_and_reads_back(finished: Finished) -> None:
    result = finished[0]
    completed = [trial for trial in result.trials if trial.status is TrialStatus.COMPLETED]
    accuracies = [trial.last.val_accuracy for trial in completed if trial.last and trial.last.val_accuracy]
    winner = result.ranked[0]
    assert winner.last is not None
    assert winner.last.val_accuracy == max(accuracies)
    assert len(result.ranked) == min(2, len(completed))
    assert load_best(result.best_path) == winner.config
    assert not result.interrupted


@pytest.mark.slow
def test_files_say_where_they_come_from(finished: Finished) -> None:
    result = finished[0]
    assert RunFolder(result.folder).space.read_text() == SPACE
    provenance = load_provenance(result.folder)
    assert provenance == result.provenance
    assert (provenance.run, provenance.device, provenance.seed) == ("run", "cpu", 3)
    assert provenance.command == ("scripts/search.py", "--seed", "3")
    assert (provenance.train_images, provenance.validation_images) == (1413, 128)


@pytest.mark.slow
def test_study_holds_every_epoch_of_every_trial(finished: Finished) -> None:
    trials = {trial.trial_id: trial for trial in finished[0].trials}
    told = {trial.user_attrs["trial_id"]: trial for trial in load_study(finished[0].folder).trials}
    assert told.keys() == trials.keys()
    for trial_id, trial in trials.items():
        assert told[trial_id].intermediate_values == {epoch.epoch: epoch.val_accuracy for epoch in trial.epochs}


@pytest.mark.slow
def test_dashboard_shows_the_run_and_its_workers_while_it_runs(finished: Finished) -> None:
    answers = finished[1].answers
    actors = answers["/logical/actors"]["data"]["actors"].values()
    assert {actor["className"] for actor in actors if actor["state"] == "ALIVE"} == {"AmpTrainable"}
    assert [job["metadata"]["tune_amp"] for job in answers["/api/jobs/"]] == ["test_search"]


@pytest.mark.slow
def test_replay_of_the_winner_equals_its_record_bit_for_bit(finished: Finished, digits: Dataset) -> None:
    winner = finished[0].ranked[0]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(winner.num_threads)
    try:
        again = list(replay_trial(winner.config, digits, torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert len(again) == len(winner.epochs) == 3
    for recorded, replayed in zip(winner.epochs, again, strict=True):
        assert find_differences(recorded, replayed) == []


# Trials that go wrong

FAULTY_MODEL = """
import os
import pathlib
import torch

class Net(torch.nn.Linear):
    def forward(self, images):
        logits = super().forward(images.flatten(1))
        # Not on the two images of the check before a search.
        return fault(len(images), logits) if self.training and len(images) > 2 else logits

def net(shape, classes):
    return Net(784, classes)

"""


def statuses_by_batch_size(result: SearchResult) -> dict[int, set[str]]:
    statuses: dict[int, set[str]] = {}
    for trial in result.trials:
        statuses.setdefault(trial.config.batch_size, set()).add(str(trial.status))
    return statuses


class OnFullDisk(Observer):
    """Cannot tell that a trial has ended. What leaves a callback of Tune's would count as a fault of the trial."""

    def on_progress(self, progress: SearchProgress, ended: TrialRecord | None) -> None:
        if ended is not None:
            raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_trials_that_diverge_run_out_of_memory_or_raise_are_rows_and_the_search_goes_on(
    search: Search, write_module: Callable[[str], str]
) -> None:
    """The module lies in the current folder, which became that only after Ray had started.

    Nor does an observer that fails cost any trial anything.
    """
    module = write_module(
        FAULTY_MODEL + "def fault(batch_size, logits):\n"
        "    if batch_size == 100: torch.empty(2**46)\n"
        "    if batch_size == 110: raise ValueError('line one\\nline two')\n"
        "    return logits * float('nan') if batch_size == 120 else logits\n"
    )
    result = search(
        BATCHES,
        OnFullDisk(),
        model=f"{module}:net",
        seed=0,
        num_samples=8,
        reduction_factor=1.01,
        gpus_per_trial=1.0,
    )
    assert len(result.trials) == 8
    statuses = statuses_by_batch_size(result)
    sound = statuses.pop(256)
    assert statuses == {100: {"out_of_memory"}, 110: {"failed"}, 120: {"diverged"}}
    assert sound <= {"completed", "stopped"}
    errors = {trial.config.batch_size: trial.error for trial in result.trials}
    assert "can't allocate memory" in (errors[100] or "")
    assert re.fullmatch(rf"ValueError: line one line two \({module}\.py:\d+\)", errors[110] or "")
    assert errors[120] == "diverged: weights are not finite"
    assert errors[256] is None
    assert {trial.config.batch_size for trial in result.ranked} == {256}
    # A whole GPU each, and Ray believes in one: they took turns.
    events = [event["event"] for event in read_journal(RunFolder(result.folder).journal)]
    assert [event for event in events if event in ("start", "end", "lost")] == ["start", "end"] * 8


HUNGRY_MODEL = """
import math
import os
import pathlib
import time
import ray
from torch import nn

def wait_for_another():
    folder = pathlib.Path({folder!r})
    (folder / str(os.getpid())).touch()
    patience = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > patience:
            raise RuntimeError("no other trial came")
        time.sleep(0.01)

def net(input_shape, num_classes):
    try:
        share = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    except AssertionError:  # the driver, which only looks whether the model fits
        share = 2.0
    if share < {needed}:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if share < 1.0:
        wait_for_another()
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_trial_out_of_memory_is_tried_again_with_twice_its_share_of_the_gpu(
    search: Search, write_module: Callable[[str], str], tmp_path: Path
) -> None:
    """The first trial waits for the second to share the GPU: on a busy machine it would be over before that."""
    (tmp_path / "workers").mkdir()
    module = write_module(HUNGRY_MODEL.format(needed=0.5, folder=str(tmp_path / "workers")))
    visitor = Visitor()
    result = search(SPACE, visitor, num_samples=2, gpus_per_trial=0.25, model=f"{module}:net", scheduler="none")
    assert [trial.status for trial in result.trials] == ["completed"] * 2
    assert {trial.error for trial in result.trials} == {"out of memory with 0.25 GPU, tried again with 0.5"}
    assert [len(trial.epochs) for trial in result.trials] == [2, 2]
    assert visitor.most_running == 2
    if not torch.cuda.is_available():  # Ray believes in a GPU, and torch sees none
        assert {trial.device for trial in result.trials} == {"cpu"}
    assert {trial.state for trial in load_study(result.folder).trials} == {TrialState.COMPLETE}


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_trial_out_of_memory_twice_is_told_once_as_infeasible(
    search: Search, write_module: Callable[[str], str]
) -> None:
    module = write_module(HUNGRY_MODEL.format(needed=1.1, folder=""))
    result = search(SPACE, num_samples=1, gpus_per_trial=0.5, model=f"{module}:net")
    [trial] = result.trials
    assert trial.status == "out_of_memory"
    assert trial.error is not None
    assert trial.error.startswith("RuntimeError: CUDA out of memory")
    assert trial.error.endswith("out of memory with 0.5 GPU, tried again with 1")
    assert result.ranked == []
    assert not result.interrupted
    [told] = load_study(result.folder).trials
    assert told.state is TrialState.COMPLETE
    assert told.constraints == {"hopeless": 1.0}


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_share_of_a_gpu_is_measured_and_the_reason_told(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    announced: list[str] = []
    space = load_space(str(tmp_path / "space.yaml"))
    resources = plan_resources(SearchOptions(max_epochs=2), space, digits, announced.append)
    assert len(announced) == 1
    assert plan_resources(SearchOptions(max_epochs=2, num_samples=1), space, digits, announced.append).gpus == 1.0
    assert len(announced) == 1, "one trial has nobody to share with"
    assert resources.gpus in (0.5, 1.0)
    assert re.search(
        r"each, of 1 GPUs and 2 CPUs: 2 trials on a GPU train (only )?[\d.]+ times as fast as one", resources.reason
    )
    assert plan_resources(SearchOptions(gpus_per_trial=0.25), space, digits).gpus == 0.25


def resume_until(
    stage: str, digits: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes = b"", **arguments: Any
) -> None:
    """Resume a run whose only trial was cut off, without Ray, until ``stage`` of ``tune_amp.search.run`` fails."""
    space = parse_space("x", "parameters:\n  lr: {low: 1.0e-3, high: 1.0e-2, log: true}\n")
    options = make_options(num_samples=4, max_epochs=2, confirm_seeds=0)
    sizes: dict[str, Any] = {
        "train_images": len(digits.train),
        "objectives": ("val_accuracy",),
        "seed": 0,
        "num_samples": 4,
    }
    searcher = AmpSearch(space, list_shared(digits, options), folder=folder, study_name=folder.name, **sizes)
    begun = [
        past_runs.trial("aaaaaaaa", 0) | {"config": vars(searcher.suggest("aaaaaaaa"))},
        past_runs.start("aaaaaaaa"),
    ]
    searcher.close()
    with RunFolder(folder).study.open("ab") as study:
        study.write(damage)
    monkeypatch.setattr("tune_amp.search.run.list_nodes", lambda: [{"CPU": 2.0}])

    def fail(*_: object, **__: object) -> None:
        raise InputError("line 7: no")

    monkeypatch.setattr(f"tune_amp.search.run.{stage}", fail)
    resources = TrialResources(cpus=1, gpus=0.0, max_concurrent=1, reason="")
    with past_runs.written_past(folder, past_runs.session(), *begun) as written:
        written.provenance = dataclasses.replace(written.provenance, run=folder.name)
        plan = SearchPlan(
            space=space, dataset=digits, options=options, folder=folder, resources=resources, unfit={}, history=written
        )
        with pytest.raises(InputError, match="line 7"):
            run_search(plan, Observer(), **arguments)


def test_resume_that_fails_before_its_trials_run_leaves_none_running_in_the_study(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume_until("restore_scheduler", digits, tmp_path, monkeypatch)
    assert {trial.state for trial in load_study(tmp_path).trials} == {TrialState.FAIL}
    assert len(load_study(tmp_path).trials) == 2  # as interrupted, twice
    assert not (tmp_path / "ray").exists()


def test_resume_says_what_it_makes_anew_and_which_checkpoints_will_stay(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray").mkdir()  # made by a version that left no proof
    lines: list[str] = []
    resume_until("TrialSource", digits, tmp_path, monkeypatch, damage=b"\xff\n\n", announce=lines.append)
    study, checkpoints = lines
    assert study.startswith(f"{tmp_path}/study.journal: cannot be read (UnicodeDecodeError: ")
    assert checkpoints.startswith(f"{tmp_path}/ray was not made by this run folder")
    assert [trial.state for trial in load_study(tmp_path).trials] == [TrialState.FAIL]
    with open_history(tmp_path) as past:
        assert past.storages[1][:2] == (None, "ray-2")
        storage = prepare_storage(None, tmp_path, earlier=past.storages)
    assert storage.list_foreign() == [f"{tmp_path}/ray"]


@pytest.mark.slow
def test_trials_fit_into_the_slot_time(finished: Finished) -> None:
    result = finished[0]
    assert result.slot_time.slots == 2
    assert 0 < sum(trial.wall_seconds for trial in result.trials) < 2 * result.slot_time.wall_seconds
    seconds = utilisation(result.trials, result.slot_time)
    completed = [trial.epochs[-1] for trial in result.trials if trial.status is TrialStatus.COMPLETED]
    assert seconds[SlotUse.USEFUL] == pytest.approx(sum(epoch.train_seconds for epoch in completed))
    assert min(seconds[use] for use in (SlotUse.USEFUL, SlotUse.EVALUATION, SlotUse.REST)) > 0
    assert {trial.worker for trial in result.trials} <= {1, 2}
    assert all(trial.setup_seconds > 0 for trial in result.trials)


@pytest.mark.slow
@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("seconds", [0.01, 7.0])
def test_time_budget_interrupts_what_still_runs_and_is_no_interruption(search: Search, seconds: float) -> None:
    result = search(SPACE, num_samples=50, max_epochs=1000, grace_period=1000, time_budget=seconds)
    assert {trial.status for trial in result.trials} <= {TrialStatus.INTERRUPTED}
    assert len(result.trials) <= 3
    assert result.is_out_of_time
    assert not result.interrupted
    assert bool(result.ranked) == any(trial.epochs for trial in result.trials)


@pytest.mark.slow
@pytest.mark.usefixtures("session")
def test_what_does_not_fit_is_refused_before_anything_is_written(search: Search, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at most the 1,413 training images of digits, got 2000"):
        search("parameters:\n  batch_size: {choices: [2000, 64]}\n")
    with pytest.raises(InputError, match=r"--cpus-per-trial: must be at most the \d+ CPUs that Ray has, got 2000"):
        search(SPACE, cpus_per_trial=2000)
    assert list((tmp_path / "run").iterdir()) == []


# Without Ray


@pytest.mark.parametrize("name", [path.name for path in RunFolder(Path()).files])
def test_file_that_was_put_into_the_folder_of_a_new_run_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    refused = pytest.raises(InputError, match=f"{name}: was put there by another program, and is left alone")
    with refused, begin_run(tmp_path, load_space("quick"), PROVENANCE, {}):
        pytest.fail("was begun")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def make_options(**changes: Any) -> SearchOptions:
    return SearchOptions(**{"num_samples": 2, **changes})


def fail(error: str = "E: shape [64, 10]", **changes: Any) -> TrialRecord:
    return make_trial(f"{next(NUMBERS)}", **{"status": TrialStatus.FAILED, "epochs": (), "error": error, **changes})


NUMBERS = itertools.count()
RUNNING: dict[str, Any] = {"status": TrialStatus.INTERRUPTED, "error": None}
FULL: dict[str, Any] = {"status": TrialStatus.OUT_OF_MEMORY, "error": "MemoryError: none left"}
REASON = (
    "the first 3 trials all failed with the same error: E: shape [64, 10]; "
    "fix its cause and resume, or resume with a larger --max-failures"
)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([fail(), fail("E: shape [128, 10]"), fail()], REASON),
        ([fail(), fail(**FULL), fail(), fail(), fail(**RUNNING)], REASON),
        ([fail(), fail()], None),
        ([fail(), fail(**RUNNING), fail(), fail(), fail()], None),  # it may do better
        ([fail(), fail("E: no kernel"), fail(), fail()], None),
        ([fail(**FULL), fail(**FULL), fail(**FULL)], None),
        ([fail(), fail(), fail(), fail(**RUNNING, epochs=(make_epoch(),))], None),
        ([fail(), fail(), fail(epochs=(make_epoch(),))], None),
        ([], None),
    ],
)
def test_search_is_failing_where_its_first_trials_failed_alike_and_none_has_reported(
    trials: list[TrialRecord], expected: str | None
) -> None:
    assert find_failing(trials, 3) == expected


def test_search_that_fails_is_stopped_unless_its_last_trial_has_begun() -> None:
    asked = []
    for num_samples, max_failures in ((2, 2), (3, 3), (3, 2)):
        stop = StopRequest()
        stop_if_failing(make_options(num_samples=num_samples, max_failures=max_failures), stop, [fail(), fail()])
        asked.append(stop.reason)
    assert asked == [None, None, REASON.replace("first 3", "first 2")]


@pytest.mark.parametrize(
    ("statuses", "time_budget", "seconds", "expected"),
    [
        (["completed", "failed"], None, 5.0, False),
        (["completed"], None, 5.0, True),  # one never began
        (["completed", "interrupted"], None, 5.0, True),
        (["completed", "interrupted"], 10.0, 5.0, True),  # by a signal, before the budget was spent
        (["completed", "interrupted"], 10.0, 10.1, False),
        ([], None, 0.1, True),
        (["stopped", "diverged"], 10.0, 5.0, False),
    ],
)
def test_search_is_interrupted_where_trials_are_missing_with_budget_left(
    statuses: list[str], time_budget: float | None, seconds: float, expected: bool
) -> None:
    trials = [make_trial(f"{number}", status=TrialStatus(status)) for number, status in enumerate(statuses)]
    assert was_interrupted(trials, make_options(time_budget=time_budget), seconds) is expected
